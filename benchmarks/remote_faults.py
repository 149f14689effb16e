"""Faults on the way to a device: what was measured stays, the profile goes on or resumes, and it says what happened.

    python -m benchmarks.remote_faults            # 30 cuts of the connection, 30 kills of the program, and some others

The device is this machine behind an sshd of the benchmark's own, its runtime the null device's: faults don't depend on
what is timed. Writes benchmarks/results/remote_faults_<date>.md. Exit code 1 where something was lost or not said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from edgeprune.device import Device
from edgeprune.errors import EdgepruneError
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS
from edgeprune.profiling import profile
from edgeprune.ssh_link import ssh_link
from edgeprune.table import read_lines
from tests.sshd import Sshd, running_sshd, why_not

RESULTS = Path(__file__).parent / "results"
BRIEF = replace(KERNELS, warmup_ms=0.5, burst_ms=0.5)
MOST_RUNS = 200


@dataclass
class Tally:
    """What a series of faults did."""

    faults: int = 0
    runs: int = 0
    rows: int = 0
    lost: int = 0
    failed: int = 0
    unsaid: int = 0
    messages: tuple[str, ...] = ()


def kernels(count: int) -> list[Kernel]:
    return [Kernel(operator="linear", c_in=16 + n, c_out=64, epilogue=("bias",)) for n in range(count)]


def far(sshd: Sshd, name: str, **changes: Any) -> Device:
    """A null device whose runs really take a little time, so that faults hit it in the middle."""
    return sshd.device(name, python=sys.executable, **({"options": {"sleep_ms": 0.05}} | changes))


def series(device: Device, fault: Callable[[], bool], options: argparse.Namespace, folder: Path) -> Tally:
    """Profiles, one table after the other, with faults at random moments until there were enough of them.

    A run that gives up must say how much is saved, and the next one goes on from there.
    """
    tally, rng, stop = Tally(), random.Random(options.seed), threading.Event()

    def strike() -> None:
        while tally.faults < options.faults and not stop.wait(rng.uniform(0.1, options.longest)):
            tally.faults += fault()
        stop.set()

    thread = threading.Thread(target=strike)
    thread.start()
    wanted, messages, table = kernels(options.kernels), list[str](), 0
    try:
        while not stop.is_set() and tally.runs < MOST_RUNS:
            path, table = folder / f"{device.name}{table}.jsonl", table + 1
            promised = 0
            while tally.runs < MOST_RUNS:
                tally.runs += 1
                told: list[int] = []
                try:
                    profile(wanted, device, table_path=path, timing=BRIEF, on_progress=lambda n, _: told.append(n))  # noqa: B023
                    break
                except EdgepruneError as error:
                    promised += max(told, default=0)
                    messages.append(f"exit {error.exit_code}: {error}")
                    tally.unsaid += "saved in" not in str(error) and bool(told)
                    lines = read_lines([path]) if path.exists() else None
                    tally.lost += max(0, promised - (len(lines.rows) + len(lines.failures) if lines else 0))
            lines = read_lines([path])
            measured = {str(row.kernel) for row in lines.rows}
            failed = {str(failure.kernel) for failure in lines.failures} - measured
            tally.rows += len(measured)
            tally.failed += len(failed)
            tally.lost += len(wanted) - len(measured | failed)
    finally:
        stop.set()
        thread.join()
    tally.messages = tuple(dict.fromkeys(message.splitlines()[0][:300] for message in messages))
    return tally


def program_pid(device: Device) -> int | None:
    """The device program's process, as its guard has written it down."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        return int(json.loads(Path(str(device.folder), "owner").read_text())["pids"][1])
    return None


def kill(device: Device, number: int = signal.SIGKILL) -> bool:
    pid = program_pid(device)
    with suppress(ProcessLookupError):
        if pid is not None and _is_program(pid):
            os.kill(pid, number)
            return True
    return False


def _is_program(pid: int) -> bool:
    with suppress(OSError):
        return b"/programs/" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def hang(sshd: Sshd, folder: Path, timeout_s: float = 4.0) -> dict[str, Any]:
    """The program is stopped (SIGSTOP) while it measures: nothing comes any more, and nothing ends by itself."""
    device = far(sshd, "hung", timeout_s=timeout_s)
    wanted, stopped = kernels(24), list[float]()

    def told(done: int, total: int) -> None:
        if done == 8 and not stopped:
            stopped.append(time.monotonic())
            threading.Timer(0.15, lambda: kill(device, signal.SIGSTOP)).start()

    begun = time.monotonic()
    table = profile(wanted, device, table_path=folder / "hung.jsonl", timing=BRIEF, on_progress=told)
    seconds = time.monotonic() - begun
    begun = time.monotonic()
    profile(wanted, device, table_path=folder / "calm.jsonl", timing=BRIEF)
    calm = time.monotonic() - begun
    reasons = list(table.failures.values())
    named = len(reasons) == 1 and f"no answer within {timeout_s:g} s" in reasons[0]
    return {
        "timeout_s": timeout_s,
        "seconds": round(seconds, 2),
        "without": round(calm, 2),
        "measured": len(table),
        "failed": {kernel.key: reason for kernel, reason in table.failures.items()},
        "ok": named and len(table) == 23 and seconds - calm < 2 * timeout_s,
    }


def full_disk(sshd: Sshd, folder: Path) -> dict[str, Any]:
    """A file system of 2 MB over there that something else fills up; then there is room again.

    The models that lie there go too: else those would make room for the next ones.
    """
    place = folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=False).returncode == 0
    if not mounted:
        return {"skipped": "a small file system can't be mounted here", "ok": True}
    filler, path = place / "filler", folder / "full.jsonl"
    device = far(sshd, "full", folder=str(place / "edgeprune"))

    def fill(done: int, total: int) -> None:
        if done == 8 and not filler.exists():
            for stored in (place / "edgeprune" / "models").iterdir():
                shutil.rmtree(stored)
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)

    said = ""
    try:
        try:
            profile(kernels(24), device, table_path=path, timing=BRIEF, on_progress=fill)
        except EdgepruneError as error:
            said = f"exit {error.exit_code}: {error}"
        saved = len(read_lines([path]).rows)
        filler.unlink()
        after = len(profile(kernels(24), device, table_path=path, timing=BRIEF))
    finally:
        ssh_link(device).close()
        subprocess.run(["umount", "-l", str(place)], check=False)
    ok = "No space left" in said and "saved in" in said and saved == 8 and after == 24
    return {"said": said, "saved": saved, "after there was room": after, "ok": ok}


def command_line(sshd: Sshd, folder: Path, *, known: bool, cut_off: bool) -> tuple[int, str]:
    """Exit code and message of `edgeprune profile` where the host key is unknown, or the host doesn't answer."""
    device = far(sshd, "cli")
    host = {"host": "127.0.0.1", "port": 1} if cut_off else {"host": device.host}
    entry = {"transport": "ssh", "backend": "null", "ssh_config": device.ssh_config, **host}
    (folder / "devices.yaml").write_text(json.dumps({"schema": 1, "devices": {"cli": entry}}))
    env = {**os.environ, "EDGEPRUNE_CONFIG_DIR": str(folder), "EDGEPRUNE_CACHE_DIR": str(folder / "cache")}
    if not known:
        sshd.forget_host_key()
    command = [sys.executable, "-m", "edgeprune", "profile", "--device", "cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    sshd.know_host_key()
    return done.returncode, done.stderr.strip()


def report(options: argparse.Namespace, told: dict[str, Any], ok: bool) -> list[str]:
    lines = [
        f"# Faults on the way to a device, {date.today()}",
        "",
        f"`{' '.join(['python', '-m', 'benchmarks.remote_faults', *sys.argv[1:]])}`, Python "
        f"{platform.python_version()}, {_ssh_version()}, {platform.machine()}. "
        "The device is this machine behind an sshd on 127.0.0.1; the null "
        "runtime, so no number here is a latency.",
        "",
        "| fault | how often | profiles | rows | lost | kernels given up | without a word of what is saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("connection cut (device's sshd killed)", "ssh killed here", "device program killed"):
        t: Tally = told[name]
        lines.append(f"| {name} | {t.faults} | {t.runs} | {t.rows} | {t.lost} | {t.failed} | {t.unsaid} |")
    lines += [
        "",
        "*Kernels given up*: the program was killed twice while the same kernel ran, which makes it a failure that "
        "`--retry-failed` tries again. Where a profile ended with an error, it said:",
        "",
    ]
    for name, found in told.items():
        if isinstance(found, Tally):
            lines += [f"- {name}: {message}" for message in found.messages]
    hung = told["hung"]
    lines += [
        "",
        f"**A kernel that hangs** (the program is stopped by SIGSTOP, time-out {hung['timeout_s']:g} s): "
        f"{hung['measured']} of 24 kernels measured in {hung['seconds']} s, {hung['without']} s without it; given up: "
        + "; ".join(f"`{key}`: {reason}" for key, reason in hung["failed"].items()),
        "",
        f"**Disk full over there**: {json.dumps({k: v for k, v in told['full'].items() if k != 'ok'})}",
        "",
        f"**Unknown host key**: exit {told['unknown'][0]}: {told['unknown'][1]}",
        "",
        f"**No answer**: exit {told['away'][0]}: {told['away'][1]}",
        "",
        "All as promised." if ok else "**Not as promised.**",
    ]
    return lines


def _ssh_version() -> str:
    return subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr.split(",")[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="of each kind")
    parser.add_argument("--kernels", type=int, default=160, help="of each table")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds between two faults, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-result", action="store_true", help="print, write no file")
    options = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    told: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="edgeprune-faults-") as scratch,
        running_sshd(Path(scratch, "sshd")) as sshd,
    ):
        folder = Path(scratch)
        cut, client, killed = (far(sshd, name) for name in ("cut", "client", "killed"))
        told["connection cut (device's sshd killed)"] = series(cut, lambda: bool(sshd.cut()), options, folder)
        told["ssh killed here"] = series(client, lambda: _kill_ssh(client), options, folder)
        told["device program killed"] = series(killed, lambda: kill(killed), options, folder)
        told["hung"] = hang(sshd, folder)
        told["full"] = full_disk(sshd, folder)
        told["unknown"] = command_line(sshd, folder, known=False, cut_off=False)
        told["away"] = command_line(sshd, folder, known=True, cut_off=True)
    tallies = [found for found in told.values() if isinstance(found, Tally)]
    ok = all(t.lost == 0 and t.unsaid == 0 and t.faults >= options.faults for t in tallies)
    ok = ok and told["hung"]["ok"] and told["full"]["ok"]
    ok = ok and told["unknown"][0] == 4 and "is not known here" in told["unknown"][1]
    ok = ok and told["away"][0] == 4 and "can't be reached" in told["away"][1]
    text = "\n".join(report(options, told, ok)) + "\n"
    print(text)
    if not options.no_result:
        (RESULTS / f"remote_faults_{date.today()}.md").write_text(text, encoding="utf-8")
    return 0 if ok else 1


def _kill_ssh(device: Device) -> bool:
    """The master of this side, by the process id that it tells itself."""
    link = ssh_link(device)
    if not link.socket.exists():
        return False
    command = ["ssh", "-S", str(link.socket), "-O", "check", "--", str(device.host)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    digits = "".join(char for char in told.partition("pid=")[2].partition(")")[0] if char.isdigit())
    with suppress(ProcessLookupError):
        if digits:
            os.kill(int(digits), signal.SIGKILL)
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
