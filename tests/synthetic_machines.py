"""*Synthetic* machines: files and programs as public documents describe them, written into a folder. None was copied
from a device; each says where its shape comes from. What they prove is that such answers are read right, no more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Files by their path below the root; programs by name, as the body of a shell script."""

    files: Mapping[str, str]
    programs: Mapping[str, str] = field(default_factory=dict)

    def written(self, folder: Path) -> Path:
        """Lay it out below `folder`: root and bin; gives the root."""
        for name, text in self.files.items():
            path = folder / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for name, body in self.programs.items():
            program(folder / "bin" / name, body)
        return folder / "root"


def program(path: Path, body: str) -> None:
    """A stand-in program: a shell script, executable."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def path_with(folder: Path) -> str:
    """A PATH on which the programs of a machine come first, and its own nvidia-smi or jetson_clocks hide nothing."""
    return os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), "/usr/bin", "/bin"])


_CPU = "sys/devices/system/cpu/"

# Board, SoC and zones: NVIDIA, Jetson Linux Developer Guide r36.3, "Jetson Orin Nano Series, ...": thermal zones
# cpu-thermal, gpu-thermal, tj-thermal; hwmon soctherm_oc with oc<n>_event_cnt; ina3221 with VDD_IN; devfreq
# 17000000.gpu (17000000.ga10b in r35). https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance/
# `nvpmodel -q` prints the name, then the number. /etc/nv_tegra_release: "# R36 (release), REVISION: 3.0, ...".
# tegrastats: https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
TEGRASTATS = (
    "10-05-2026 21:03:35 RAM 2463/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [12%@729,5%@729,0%@1510,0%@1510,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 34%@[624] NVDEC off "
    "cpu@48.5C soc2@47C soc0@46.8C gpu@47.1C tj@48.9C soc1@46C cv0@-256C VDD_IN 4984mW/4984mW VDD_SOC 1500mW/1500mW"
)
JETSON = Machine(
    files={
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 3.0, GCID: 36106755, BOARD: generic, EABI: aarch64\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"\n',
        "proc/sys/kernel/osrelease": "5.15.136-tegra\n",
        "proc/meminfo": "MemTotal:        7803160 kB\nMemFree:         4000000 kB\n",
        _CPU + "cpu0/cpufreq/scaling_governor": "schedutil\n",
        _CPU + "cpu0/cpufreq/scaling_cur_freq": "729600\n",
        _CPU + "cpu1/cpufreq/scaling_cur_freq": "1510400\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/thermal/thermal_zone2/type": "tj-thermal\n",
        "sys/class/thermal/thermal_zone2/temp": "48906\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
        "sys/class/thermal/cooling_device1/cur_state": "0\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
        "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
        "sys/class/hwmon/hwmon1/name": "ina3221\n",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon1/in1_input": "5040\n",
        "sys/class/hwmon/hwmon1/curr1_input": "1000\n",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "15\n",
    },
    programs={
        "nvpmodel": 'test "$1" = -q && printf "NV Power Mode: 15W\\n0\\n"',
        "dpkg-query": "printf 6.0+b106",
        "tegrastats": f'while :; do echo "{TEGRASTATS}"; sleep 0.05; done',
        "nvidia-smi": "exit 9",  # JetPack 6 has one, which knows nothing of this GPU
    },
)

# vcgencmd get_throttled: https://www.raspberrypi.com/documentation/computers/os.html#get_throttled; the same word
# stands in /sys/devices/platform/soc/soc:firmware/get_throttled (drivers/firmware/raspberrypi.c of its kernel).
RASPBERRY_PI = Machine(
    files={
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "proc/meminfo": "MemTotal:        8245784 kB\n",
        "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-2712\n",
        "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\nFeatures\t: fp asimd asimddp\n\n",
        _CPU + "cpu0/cpufreq/scaling_governor": "ondemand\n",
        _CPU + "cpu0/cpufreq/scaling_cur_freq": "2400000\n",
        "sys/class/thermal/thermal_zone0/temp": "61700\n",
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
        "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    },
    programs={"vcgencmd": "echo throttled=0x50005"},
)

# thermal_throttle: Documentation/admin-guide/thermal/intel_thermal_throttle.rst; powercap: Documentation/power/powercap
# cooling devices: Documentation/ABI/testing/sysfs-class-thermal; all of the Linux kernel.
X86 = Machine(
    files={
        "sys/class/dmi/id/sys_vendor": "ASUSTeK COMPUTER INC.\n",
        "sys/class/dmi/id/product_name": "NUC14RVH\n",
        "proc/meminfo": "MemTotal:       32500000 kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Core(TM) Ultra 7 155H\ncpu MHz\t\t: 3791.000\n\n"
        "processor\t: 1\ncpu MHz\t\t: 4791.000\n\n",
        _CPU + "cpu0/cpufreq/scaling_governor": "powersave\n",
        _CPU + "cpu0/thermal_throttle/core_throttle_count": "3\n",
        _CPU + "cpu1/thermal_throttle/core_throttle_count": "1\n",
        _CPU + "cpu0/thermal_throttle/package_throttle_count": "7\n",
        "sys/class/thermal/thermal_zone0/temp": "27800\n",
        "sys/class/thermal/thermal_zone1/temp": "88000\n",
        "sys/class/thermal/cooling_device0/type": "Processor\n",
        "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",
    }
)

# nvidia-smi --query-gpu=... --format=csv,noheader,nounits; names by `nvidia-smi --help-query-gpu`; bits of the reasons:
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
CARD_LINE = "NVIDIA GeForce RTX 4090, 550.54.14, 8.9, 24564, 2520, 61, 312.50, 0x0000000000000024"
CARD = Machine(
    files={"proc/meminfo": "MemTotal: 65000000 kB\n"},
    programs={"nvidia-smi": f'echo "{CARD_LINE}"'},
)
