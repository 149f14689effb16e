"""A bundle goes to another folder, is verified there, and runs where there is nothing but its runtime and numpy.

    python -m benchmarks.round_trip                     # OpenVINO and ONNX Runtime; writes a report
    python -m benchmarks.round_trip --devices host-tflite
    python -m benchmarks.round_trip --model torchvision:mobilenet_v2 --shape 1x3x224x224

A network with every second channel of each group cut (random weights) is exported, the bundle moved, checked with
`edgeprune verify`, and run by `edgeprune.load_bundle`. Then environments of their own are made, with pip, that hold the
runtime and numpy alone: the bundle's run.py has to check it, time it, and give the same outputs there. One environment
has an ONNX Runtime older than the file asks for: refused with exit code 5. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ALLOWED_DIFFERENCE = 1e-5
"""Largest |a - b| / largest |b| between outputs of different versions of a runtime; those of one version are equal."""
HOMES = Path.home() / ".pyenv" / "versions"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where run.py is tried: the device whose bundle it is, a Python, what pip installs, the right exit code."""

    device: str
    packages: tuple[str, ...]
    python: str = ""
    code: int = 0

    @property
    def interpreter(self) -> str | None:
        """This one, or pyenv's of another version."""
        if not self.python:
            return sys.executable
        found = sorted(HOMES.glob(f"{self.python}.*/bin/python"))
        return str(found[-1]) if found else None


PACKAGES = {"host-openvino": "openvino", "host-onnxruntime": "onnxruntime", "host-tflite": "ai-edge-litert"}
OLD = (
    Environment(device="host-openvino", packages=("openvino==2024.4.0", "numpy"), python="3.8"),
    Environment(device="host-onnxruntime", packages=("onnxruntime==1.18.1", "numpy"), python="3.8"),
    Environment(device="host-onnxruntime", packages=("onnxruntime==1.17.3", "numpy"), python="3.8", code=5),
    Environment(device="host-tflite", packages=("tflite-runtime==2.14.0", "numpy<2"), python="3.10"),
    Environment(device="host-tflite", packages=("tflite-runtime==2.14.0", "numpy<2"), python="3.8"),
)
"""Runtimes of other days, under old Pythons."""


def environments(device: str) -> list[Environment]:
    """The runtime of this version, then old ones."""
    from importlib.metadata import version

    here = f"{PACKAGES[device]}=={version(PACKAGES[device])}"
    return [Environment(device=device, packages=(here, "numpy")), *(each for each in OLD if each.device == device)]


@dataclass(kw_only=True)
class Tried:
    """What came of one environment."""

    environment: Environment
    installed: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    difference: float | None = None
    fault: str | None = None


def write_plan(model: str, shape: str, path: Path) -> int:
    """Every second channel of each group that is not tied to an output; gives how many groups there are."""
    from edgeprune.graph import trace
    from edgeprune.models import example_inputs, resolve
    from edgeprune.plan_json import Plan

    module = resolve(model, weights=None, seed=0)
    graph = trace(module, example_inputs(shape, (), model=module, seed=0))
    kept = {group.id: tuple(range(0, group.num_channels, 2)) for group in graph.groups if group.num_channels > 1}
    Plan(structure_hash=graph.structure_hash, kept=kept).to_json(path)
    return len(kept)


def edgeprune(*arguments: str, tries: int = 1) -> dict[str, Any]:
    """A command with --json, in a process of its own; again where it was too noisy to measure (exit code 6)."""
    command = [sys.executable, "-m", "edgeprune", *arguments, "--json"]
    for _ in range(tries):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 6:
            break
    document: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode and not (done.returncode == 6 and tries > 1):
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}: {document} {done.stderr[-500:]}")
    return document


def try_environment(environment: Environment, bundle: Path, x: Path, expected: Any, work: Path) -> Tried:
    """Make it, run `run.py` and `run.py run` in it, and compare the outputs."""
    tried = Tried(environment=environment)
    interpreter = environment.interpreter
    if interpreter is None:
        tried.fault = f"no Python {environment.python} under {HOMES}"
        return tried
    folder = work / "venv"
    shutil.rmtree(folder, ignore_errors=True)
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([interpreter, "-m", "venv", str(folder)], **quiet)  # type: ignore[call-overload]
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", *environment.packages], **quiet)  # type: ignore[call-overload]
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True).stdout
    tried.installed = [f"{each['name']} {each['version']}" for each in json.loads(listed)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    run = {"capture_output": True, "text": True, "check": False, "env": clean, "cwd": str(work)}
    done = subprocess.run([python, str(bundle / "run.py"), "--json"], **run)  # type: ignore[call-overload]
    tried.told = json.loads(done.stdout or "{}")
    if done.returncode != environment.code:
        tried.fault = f"exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}"
    elif not environment.code:
        out = work / "out.npz"
        command = [python, str(bundle / "run.py"), "run", str(x), "--out", str(out)]
        done = subprocess.run(command, **run)  # type: ignore[call-overload]
        with np.load(out) as file:
            (found,) = (file[name] for name in file.files)
        out.unlink()
        tried.difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if tried.difference > (ALLOWED_DIFFERENCE if environment.python else 0.0):
            tried.fault = f"outputs differ by {tried.difference:.1e}"
    return tried


def round_trip(device: str, given: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[Tried]]:
    """One device: export, move, verify, load, and every environment."""
    from edgeprune import load_bundle
    from edgeprune.bundle import read_bundle

    made, there = work / "here" / device, work / "elsewhere" / "copied" / device
    model = [given.model, "--shape", given.shape]
    edgeprune("export", *model, "--plan", str(work / "plan.json"), "--device", device, "--out", str(made))
    shutil.copytree(made, there)
    shutil.rmtree(made)
    told = edgeprune("verify", str(there), "--duration-s", "20", tries=3)
    shape = tuple(int(size) for size in given.shape.split("x"))
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    np.save(work / "x.npy", x)
    with load_bundle(there) as bundle:
        expected = bundle.run(x)
    tried = [try_environment(each, there, work / "x.npy", expected, work) for each in environments(device)]
    manifest = read_bundle(there).manifest  # whatever ran has left nothing in the folder
    return {**told, "files": len(manifest.files), "least": manifest.runtime.least}, tried


def report(results: dict[str, tuple[dict[str, Any], list[Tried]]], given: argparse.Namespace, groups: int) -> str:
    """One table for `verify`, one for the environments."""
    lines = [
        f"# Bundles moved and run elsewhere, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.round_trip --model {given.model} --shape {given.shape} --devices {given.devices}`, "
        f"Python {platform.python_version()}, {platform.machine()}; {groups} groups halved, random weights.",
        "",
        "| bundle | files | `verify` in the other folder: parity | ratio to dense | needs at least |",
        "|---|---|---|---|---|",
    ]
    for device, (told, _) in results.items():
        error, ratio = told.get("error", {}).get("message"), "-"
        if not error:
            pruned = told["pruned"]
            error = f"{told['parity']['error']:.1e}"
            ratio = f"{pruned['ratio']:.3f} [{pruned['ratio_ci'][0]:.3f}, {pruned['ratio_ci'][1]:.3f}]"
        lines.append(f"| {device} | {told['files']} | {error} | {ratio} | {told['least'] or 'not known'} |")
    lines += ["", "| bundle | Python | all that pip lists | run.py: parity | ratio to dense | outputs differ by |"]
    lines.append("|---|---|---|---|---|---|")
    for device, (_, every) in results.items():
        for tried in every:
            row = [device, tried.environment.python or platform.python_version(), ", ".join(tried.installed)]
            if tried.fault:
                row += [f"**{tried.fault}**", "", ""]
            elif tried.environment.code:
                row += [f"refused, exit code {tried.environment.code}: {tried.told['error']['message']}", "", ""]
            else:
                ratio = tried.told["ratio"]
                row += [
                    f"{tried.told['parity']['error']:.1e}",
                    f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                ]
                row.append("0: equal" if tried.difference == 0 else f"{tried.difference:.1e} of the largest")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:mobilenet_v3_small")
    parser.add_argument("--shape", default="1x3x64x64")
    parser.add_argument("--devices", default="host-openvino,host-onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeprune-round-trip-") as scratch:
        groups = write_plan(given.model, given.shape, Path(scratch, "plan.json"))
        results = {device: round_trip(device, given, Path(scratch)) for device in given.devices.split(",")}
    text = report(results, given, groups)
    given.out.mkdir(parents=True, exist_ok=True)
    which = given.devices.replace(",", "_")
    (given.out / f"round_trip_{which}_{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if any("error" in told or any(each.fault for each in every) for told, every in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
