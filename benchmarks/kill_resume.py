"""kill -9 of a profile at random moments: no finished row is lost, and the next run goes on from there.

    python -m benchmarks.kill_resume                                                 # 20 kills, null device
    python -m benchmarks.kill_resume --kills 50 --kernels 1200 --device host-openvino   # 50 on a real runtime

A child profiles into one table and prints each time how many kernels are done (they are on disk by then); it is killed
after a random time, over and over, then left to end. Exit code 1 when a row that was reported done is missing, fewer
were killed than asked (take more kernels), or the table has other kernels in the end than were asked for (with those
that a runtime refused). Writes
benchmarks/results/kill_resume_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.conditions import conditions
from edgeprune.device import Device, load_device
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS
from edgeprune.profiling import profile
from edgeprune.table import read_lines

NULL = Device(name="null", backend="null", options={"sleep_ms": 0.02})  # slow enough to be hit in the middle
RESULTS = Path(__file__).parent / "results"
BRIEF = replace(KERNELS, warmup_ms=0.5, burst_ms=0.5)


def main() -> int:
    options = _options()
    if options.table:
        _child(options.device, options.kernels, options.table)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        told, is_well = _kill_again_and_again(options, Path(folder) / "table.jsonl")
    command = " ".join(["python -m benchmarks.kill_resume", *sys.argv[1:]])
    head = f"# Kills of a profile on {options.device}, {date.today()}\n\n`{command}`, {conditions()}.\n\n"
    path: Path = options.out or RESULTS / f"kill_resume_{options.device}_{date.today()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "".join(f"    {line}\n" for line in told), encoding="utf-8")
    return 0 if is_well else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="null")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=400)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report")
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)  # marks the child
    return parser.parse_args()


def _child(name: str, count: int, table: Path) -> None:
    device = NULL if name == "null" else load_device(name)
    timing = BRIEF if name == "null" else KERNELS
    kernels = _kernels(count)
    profile(kernels, device, table_path=table, timing=timing, on_progress=lambda done, _: print(done, flush=True))


def _kernels(count: int) -> list[Kernel]:
    return [Kernel(operator="linear", c_in=16 + n, c_out=64, epilogue=("bias",)) for n in range(count)]


def _kill_again_and_again(options: argparse.Namespace, table: Path) -> tuple[list[str], bool]:
    """What was seen, and whether as many were killed as asked and nothing was lost."""
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--device", options.device]
    command += ["--kernels", str(options.kernels), "--table", str(table)]
    draw = random.Random(options.seed)
    lost = kills = 0
    told = []
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
        rows, kernels = _rows(table), len(_measured(table) | _refused(table))
        lost += max(0, promised - rows)
        killed = child.returncode == -signal.SIGKILL
        kills += killed
        state = "killed" if killed else f"ended with {child.returncode}"
        told.append(
            f"run {attempt + 1}: {state}, {kernels} of {options.kernels} kernels in {rows} rows, {promised} promised"
        )
        print(told[-1], flush=True)
        if not killed:
            break
    torn = len(read_lines([table]).warnings)
    found, expected = (
        _measured(table) | _refused(table),
        {json.dumps(kernel.to_json(), sort_keys=True) for kernel in _kernels(options.kernels)},
    )
    same = "equals" if found == expected else "differs from"
    told.append(
        f"{kills} kills: lost {lost} finished rows, {torn} torn lines skipped; the table {same} a whole profile's"
    )
    print(told[-1])
    return told, kills == options.kills and not lost and found == expected


def _refused(table: Path) -> set[str]:
    lines = read_lines([table]).failures if table.exists() else ()
    return {json.dumps(line.kernel, sort_keys=True) for line in lines}


def _measured(table: Path) -> set[str]:
    return {json.dumps(row.kernel, sort_keys=True) for row in read_lines([table]).rows} if table.exists() else set()


def _rows(table: Path) -> int:
    """All that were finished: a kernel that other work had hit is measured again and has a row more."""
    found = read_lines([table]) if table.exists() else None
    return len(found.rows) + len(found.failures) if found else 0


if __name__ == "__main__":
    sys.exit(main())
