"""Is a device over ssh as good as the local one? The same table, what the way costs, two at once, and whole fits.

    taskset -c 0 python -m benchmarks.remote [--budget 0.7x] [--no-fit]

The devices are this machine behind an sshd of the benchmark's own, each an environment with one runtime and no torch
(`make test-devices`); the local one is this environment. A device is left out where its models can't be written here,
or it was not made: for LiteRT run it once more in an environment with `edgeprune[litert]`. Two devices at once are null
devices that sleep, since two that compute would fight for the same cores. Writes
benchmarks/results/remote_<runtimes>_<date>.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.at_once import at_once
from edgeprune.backends import find_backend
from edgeprune.device import Device
from edgeprune.errors import EdgepruneError
from edgeprune.kernel import Kernel
from edgeprune.measurement import Measurement
from edgeprune.modelled import packages_missing
from edgeprune.profiling import profile
from edgeprune.ssh_link import ssh_link
from edgeprune.staircase import staircase_kernels
from edgeprune.table import LatencyTable
from edgeprune.transport import Session
from tests.sshd import ROOT, Sshd, device_python, running_sshd, why_not

RESULTS = Path(__file__).parent / "results"
DEVICES = {"openvino": "openvino", "litert": "tflite"}  # environment to backend
OPTIONS: dict[str, dict[str, Any]] = {"openvino": {}, "tflite": {"xnnpack": True}}
DELAYS_MS = (0.0, 10.0)


@dataclass
class Profiled:
    """A table and how long it took: in all, and measuring on the device alone."""

    table: LatencyTable
    wall_s: float
    measuring_s: float


def timed_profile(kernels: Sequence[Kernel], device: Device, path: Path) -> Profiled:
    """A profile on an empty table."""
    spent = [0.0]
    real = Session.measure

    def measure(self: Session, *arguments: Any, **options: Any) -> Measurement:
        measured = real(self, *arguments, **options)
        spent[0] += measured.seconds
        return measured

    Session.measure = measure  # type: ignore[method-assign]
    try:
        begun = time.perf_counter()
        table = profile(kernels, device, table_path=path)
        return Profiled(table, time.perf_counter() - begun, spent[0])
    finally:
        Session.measure = real  # type: ignore[method-assign]


def difference(first: LatencyTable, second: LatencyTable) -> tuple[float, float, float]:
    """Median size, 90th percentile and median of the relative differences of the kernels' ratios."""
    both = first.entries.keys() & second.entries.keys()
    change = np.array([second.entries[k].best_ratio / first.entries[k].best_ratio - 1 for k in both])
    return float(np.median(np.abs(change))), float(np.quantile(np.abs(change), 0.9)), float(np.median(change))


def compare(backend: str, far: Device, slow: Device, kernels: Sequence[Kernel], folder: Path, times: int) -> list[str]:
    """Local, over ssh and over a slow line in turn, several times; what they say and what they cost."""
    ways = {
        "local": Device(name=f"near-{backend}", backend=backend, options=OPTIONS[backend]),
        "ssh": far,
        "slow": slow,
    }
    found: dict[str, list[Profiled]] = {way: [] for way in ways}
    for number in range(times):
        for way, device in ways.items():
            found[way].append(timed_profile(kernels, device, folder / f"{backend}-{way}{number}.jsonl"))
    lines = []
    noise = difference(found["local"][0].table, found["local"][1].table)
    lines.append(f"| {backend} | local, twice | {noise[0]:.1%} | {noise[1]:.1%} | {noise[2]:+.1%} | | | |")
    local_s = statistics.median(each.wall_s for each in found["local"])
    for way, said in (("ssh", "ssh"), ("slow", f"ssh, {2 * DELAYS_MS[1]:g} ms there and back")):
        told = difference(found["local"][0].table, found[way][0].table)
        wall = statistics.median(each.wall_s for each in found[way])
        measuring = statistics.median(each.measuring_s for each in found[way])
        lines.append(
            f"| {backend} | {said}, beside local | {told[0]:.1%} | {told[1]:.1%} | {told[2]:+.1%} "
            f"| {local_s:.1f} | {wall:.1f} | {(wall - local_s) / measuring:+.1%} |"
        )
    return lines


def two_at_once(sshd: Sshd, folder: Path) -> str:
    """Two null devices that sleep, one twice as long; alone, then together."""
    kernels = [Kernel(operator="linear", c_in=16 + 8 * n, c_out=64) for n in range(24)]
    devices = {
        name: sshd.device(name, python=sys.executable, options={"sleep_ms": sleep})
        for name, sleep in (("slower", 0.6), ("faster", 0.3))
    }
    alone = {
        name: timed_profile(kernels, device, folder / f"{name}-alone.jsonl").wall_s for name, device in devices.items()
    }
    begun = time.perf_counter()
    at_once(
        {
            name: partial(profile, kernels, device, table_path=folder / f"{name}.jsonl")
            for name, device in devices.items()
        }
    )
    both = time.perf_counter() - begun
    return (
        f"Alone {alone['slower']:.1f} s and {alone['faster']:.1f} s, together {both:.1f} s: "
        f"{both / max(alone.values()):.2f} times the slower one."
    )


def fit(far: Device, budget: str, folder: Path) -> str:
    """`edgeprune fit` of MobileNetV2 over ssh, in a process of its own, on an empty table."""
    entry = far.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    config = folder / f"config-{far.name}"
    config.mkdir()
    (config / "devices.yaml").write_text(json.dumps({"schema": 1, "devices": {far.name: entry}}))
    env = {**os.environ, "EDGEPRUNE_CONFIG_DIR": str(config), "EDGEPRUNE_CACHE_DIR": str(config / "cache")}
    command = [
        *(sys.executable, "-m", "edgeprune", "fit", "torchvision:mobilenet_v2", "--shape", "1x3x224x224"),
        *("--device", far.name, "--budget", budget, "--saliency", "l2", "--out", str(config / "out"), "--json"),
    ]
    begun = time.perf_counter()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - begun
    told = json.loads(done.stdout or "{}")
    if "pruned" not in told:
        message = told.get("error", {}).get("message", "no document")
        return f"| {far.backend} | {budget} | exit {done.returncode} | {message} | | | | {seconds:.0f} |"
    again = subprocess.run(
        [sys.executable, "-m", "edgeprune", "verify", told["bundle"], "--json"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    verified = json.loads(again.stdout or "{}").get("met")
    pruned = told["pruned"]
    return (
        f"| {far.backend} | {budget} | {'yes' if told['met'] else 'no'} | {told['dense']['p50_ms']:.3f} "
        f"| {pruned['p50_ms']:.3f} | {pruned['ratio']:.3f}, at most {pruned['ratio_upper']:.3f} "
        f"| {'met' if verified else 'not met'} (exit {again.returncode}) | {seconds:.0f} |"
    )


def slow_config(sshd: Sshd, folder: Path, delay_ms: float) -> Path:
    """As the server's own, over a slow line."""
    proxy = f"env PYTHONPATH={ROOT} {sys.executable} -m benchmarks.slow_line {delay_ms:g} %h %p"
    path = folder / "slow_config"
    path.write_text(f"{sshd.config_text}  ProxyCommand {proxy}\n")
    return path


def chosen() -> dict[str, Path]:
    """The environments that can be devices of this one, by backend; says which can't."""
    found = {}
    for name, backend in DEVICES.items():
        python, missing = device_python(name), packages_missing(find_backend(backend))
        if python and not missing:
            found[backend] = python
        else:
            print(f"left out: {backend}: {missing or 'no test device, make test-devices'}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.7x")
    parser.add_argument("--kernels", type=int, default=64, help="of the staircase, for the comparison")
    parser.add_argument("--times", type=int, default=3, help="profiles of each way")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--no-result", action="store_true", help="print, write no file")
    options = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    stairs = staircase_kernels("fp32")
    kernels = stairs[:: max(1, len(stairs) // options.kernels)]
    pythons, tables, fits = chosen(), list[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch, running_sshd(Path(scratch, "sshd")) as sshd:
        folder = Path(scratch)
        slow_file = slow_config(sshd, folder, DELAYS_MS[1])
        for backend, python in pythons.items():
            how = {"backend": backend, "python": str(python), "options": OPTIONS[backend], "timeout_s": 120.0}
            far = sshd.device(f"far-{backend}", **how)
            slow = sshd.device(f"slow-{backend}", **{**how, "ssh_config": str(slow_file)})
            try:
                tables += compare(backend, far, slow, kernels, folder, options.times)
            except EdgepruneError as error:
                tables.append(f"| {backend} | {error} | | | | | | |")
            print("\n".join(tables), flush=True)
            ssh_link(slow).close()
            if not options.no_fit:
                fits.append(fit(far, options.budget, folder))
                print(fits[-1], flush=True)
        together = two_at_once(sshd, folder)
    text = report(tables, fits, together, f"{len(kernels)} kernels, {options.times} profiles of each way in turn")
    print(text)
    if not options.no_result:
        name = "_".join(["remote", *pythons, str(date.today())])
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    return 0 if all("yes" in line for line in fits) else 1


def report(tables: list[str], fits: list[str], together: str, what: str) -> str:
    """The page in `benchmarks/results`."""
    lines = [
        f"# Devices over ssh, {date.today()}",
        "",
        f"`{' '.join(['python', '-m', 'benchmarks.remote', *sys.argv[1:]])}`, Python {platform.python_version()}, "
        f"{platform.machine()}; {what} (medians of times, the first ones' ratios).",
        "",
        "Ratios to the reference, kernel by kernel; *cost* is what a profile takes longer than locally, over the time "
        "in which the device measures:",
        "",
        "| runtime | tables | median difference | 90 % within | bias | local s | this s | cost |",
        "|---|---|---|---|---|---|---|---|",
        *tables,
        "",
        f"Two null devices that sleep: {together}",
    ]
    if fits:
        lines += [
            "",
            "`edgeprune fit` of MobileNetV2 (random weights) over ssh, then `edgeprune verify` of the bundle:",
            "",
            "| runtime | budget | met | dense p50 ms | pruned p50 ms | ratio (95 %) | verified | seconds |",
            "|---|---|---|---|---|---|---|---|",
            *fits,
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
