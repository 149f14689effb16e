"""200 seeded ways to spoil a bundle: each is refused with a message, before a runtime is imported or a process started.

    python -m benchmarks.bundle_mutations                       # a small network for OpenVINO; writes a report
    python -m benchmarks.bundle_mutations --count 400 --seed 1

Every mutation is tried on `edgeprune verify`, `edgeprune.load_bundle` and the bundle's own `run.py`, which runs without
site-packages: what it does not refuse ends there with exit code 5 for want of numpy. Refused means exit code 1 or 2, an
error of the kind `tampered` or `input`, no traceback. Exit code 1 when any was not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bundle_spoiling import spoiled

KINDS = {"tampered": 1, "input": 2}


class Watch:
    """What comes before any engine is loaded: a runner's code is run, or a process starts. Python itself tells it."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "exec" and Path(getattr(arguments[0], "co_filename", "")).name == "runner.py":
            self.seen.append("the runner")
        elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork"):
            self.seen.append(event)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.on, self.seen = True, []
        try:
            yield self.seen
        finally:
            self.on = False


def refusal(code: int, stdout: str, stderr: str) -> str | None:
    """None where it was refused as it should, else what happened."""
    if "Traceback" in stdout + stderr:
        return f"traceback: {stderr[-300:]}"
    try:
        error = json.loads(stdout)["error"]
    except (ValueError, KeyError, TypeError):
        return f"exit code {code}, no error on stdout: {stdout[:200]!r} {stderr[-200:]!r}"
    if error["kind"] not in KINDS or error["exit_code"] != code or KINDS[error["kind"]] != code or not error["message"]:
        return f"exit code {code}: {error}"
    return None


def by_verify(folder: Path, watch: Watch) -> str | None:
    """`edgeprune verify --json`, in this process."""
    from edgeprune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with watch.watching() as seen, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["verify", str(folder), "--json"])
    return refusal(code, out.getvalue(), err.getvalue()) or (f"not before {seen[0]}" if seen else None)


def by_loading(folder: Path, watch: Watch) -> str | None:
    """`edgeprune.load_bundle`."""
    from edgeprune.errors import EdgepruneError
    from edgeprune.loading import load_bundle

    with watch.watching() as seen:
        try:
            load_bundle(folder)
        except EdgepruneError as error:
            if KINDS.get(error.kind) == error.exit_code and str(error):
                return f"not before {seen[0]}" if seen else None
            return f"{type(error).__name__}: {error}"
    return "loaded"


def by_itself(folder: Path) -> str | None:
    """The bundle's own run.py, without site-packages."""
    command = [sys.executable, "-S", "run.py", "verify", "--json"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False, errors="replace"
    )
    return refusal(done.returncode, done.stdout, done.stderr)


def make_bundle(folder: Path) -> Path:
    """A small network, random weights, for OpenVINO; not measured."""
    from edgeprune.bundle import Contents, write_bundle
    from edgeprune.device import load_device
    from edgeprune.exporting import export, export_dense
    from edgeprune.parity import samples
    from tests.small_models import Net, pruned, redrawn

    device, given = load_device("host-openvino"), pruned(redrawn(Net(8)))
    contents = Contents(
        engine=export(given, device, folder / "pruned"),
        dense=export_dense(redrawn(Net(16)), given.example_inputs, device, folder / "dense"),
        model="tests.small_models:Net",
        preprocessing={"resize": 16, "crop": [16, 16]},
        command=("exec edgeprune export",),
        samples=samples(given),
    )
    return write_bundle(folder / "net", contents).folder


def controls(whole: Path, watch: Watch) -> list[str]:
    """The bundle as it was is taken, and then what is watched for is seen: else nothing here would mean anything."""
    from edgeprune.loading import load_bundle

    faults = []
    done = subprocess.run(
        [sys.executable, "-S", "run.py", "--json"], cwd=whole, capture_output=True, text=True, check=False
    )
    if done.returncode != 5:
        faults.append(f"run.py without numpy: exit code {done.returncode}, expected 5")
    with watch.watching() as seen:
        load_bundle(whole).close()
    if "the runner" not in seen:
        faults.append(f"loading was not seen: {seen}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    began, watch = time.perf_counter(), Watch()
    tried: Counter[str] = Counter()
    faults: list[str] = []
    told: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="edgeprune-mutations-") as scratch:
        whole = make_bundle(Path(scratch))
        refused = [spoil(whole, Path(scratch), seed, watch) for seed in range(given.seed, given.seed + given.count)]
        for kind, what, found in refused:
            tried[kind] += 1
            told.setdefault(kind, []).append(what)
            faults += [f"{kind}: {what}: {by}: {fault}" for by, fault in found.items() if fault]
        faults += controls(whole, watch)
    seconds = time.perf_counter() - began
    lines = [
        f"# Bundles spoiled in {given.count} ways, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.bundle_mutations --count {given.count} --seed {given.seed}`, Python "
        f"{platform.python_version()}, {platform.machine()}, {seconds:.0f} s.",
        "",
        "| mutation | tried | refused by `verify` | by `load_bundle` | by run.py | such as |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted(tried):
        counts = [sum(k == kind and not found[by] for k, _, found in refused) for by in ("verify", "load", "run.py")]
        shown = "; ".join(f"`{what}`" for what in list(dict.fromkeys(told[kind]))[:4])
        lines.append(f"| {kind} | {tried[kind]} | {counts[0]} | {counts[1]} | {counts[2]} | {shown} |")
    lines += ["", f"Not refused, or not as it should be: {len(faults)}.", *(f"- {fault}" for fault in faults)]
    text = "\n".join(lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"bundle_mutations_{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if faults else 0


def spoil(whole: Path, scratch: Path, seed: int, watch: Watch) -> tuple[str, str, dict[str, str | None]]:
    """One mutation, and what each of the three said to it."""
    folder, kind, what = spoiled(whole, scratch, seed)
    found = {"verify": by_verify(folder, watch), "load": by_loading(folder, watch), "run.py": by_itself(folder)}
    shutil.rmtree(folder.parent)
    return kind, what, found


if __name__ == "__main__":
    sys.exit(main())
