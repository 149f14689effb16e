"""kill -9 of a profile at random moments: no finished row is lost, and the next run goes on from there.

    python benchmarks/kill_resume.py                           # 20 kills, null device
    python benchmarks/kill_resume.py --device host-openvino    # the same on a real runtime

A child profiles into one table and prints each time how many kernels are done (they are on disk by then); it is killed
after a random time, over and over, then left to end. Exit code 1 when a row that was reported done is missing.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from edgeprune.device import Device, load_device
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS
from edgeprune.profiling import profile
from edgeprune.table import read_lines

NULL = Device(name="null", backend="null", options={"sleep_ms": 0.02})  # slow enough to be hit in the middle
BRIEF = replace(KERNELS, warmup_ms=0.5, burst_ms=0.5)


def main() -> int:
    options = _options()
    if options.table:
        _child(options.device, options.kernels, options.table)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return _kill_again_and_again(options, Path(folder) / "table.jsonl")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="null")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=400)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)  # marks the child
    return parser.parse_args()


def _child(name: str, count: int, table: Path) -> None:
    kernels = [Kernel(operator="linear", c_in=16 + n, c_out=64, epilogue=("bias",)) for n in range(count)]
    device = NULL if name == "null" else load_device(name)
    timing = BRIEF if name == "null" else KERNELS
    profile(kernels, device, table_path=table, timing=timing, on_progress=lambda done, _: print(done, flush=True))


def _kill_again_and_again(options: argparse.Namespace, table: Path) -> int:
    command = [sys.executable, __file__, "--device", options.device, "--kernels", str(options.kernels)]
    command += ["--table", str(table)]
    draw = random.Random(options.seed)
    lost = kills = 0
    for attempt in range(10 * options.kills):
        before = _rows(table)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()  # measuring has begun
            if kills < options.kills:
                time.sleep(draw.uniform(0.0, options.longest))
                child.send_signal(signal.SIGKILL)
            reported = [int(line) for line in child.stdout.read().split()]
        promised = before + max(reported, default=0)
        rows = _rows(table)
        lost += max(0, promised - rows)
        killed = child.returncode == -signal.SIGKILL
        kills += killed
        state = "killed" if killed else f"ended with {child.returncode}"
        print(f"run {attempt + 1}: {state}, {rows} of {options.kernels} kernels in the table, {promised} promised")
        if not killed:
            break
    torn, rows = len(read_lines([table]).warnings), _rows(table)
    print(
        f"{kills} kills: lost {lost} finished rows, {torn} torn lines skipped, {rows} of {options.kernels} at the end"
    )
    return 0 if not lost and rows == options.kernels and kills else 1


def _rows(table: Path) -> int:
    return len({str(row.kernel) for row in read_lines([table]).rows}) if table.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
