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
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeprune.bundle_core import MANIFEST, SEAL, seal_of

Document = dict[str, Any]
KINDS = {"tampered": 1, "input": 2}
NAMES = (
    *("../outside", "/etc/hostname", "dense/../../outside", "..\\outside", "C:\\outside", "", ".", "./model.xml"),
    *("dense//model.xml", "model.xml/", "m\u043edel.xml", "\uff4dodel.xml", "model.xml\u0000", "a" * 300, ".model.xml"),
    *("model\n.xml", "model.xml ", "~/model.xml", "file:///etc/hostname", "manifest.json", "a/b/c/d/e/f/g/h/i/j"),
)
STRAYS = (
    *(".model.xml", "model.onnx.data", "numpy.py", "json.py", "__pycache__/run.cpython-311.pyc", "model.engine"),
    *("dense/.model.bin", "dense/model.json", "m\u043edel.xml", "model\\.xml", "new\nline", "weights.pt", ".DS_Store"),
)
HOW = (
    *("flip", "flip", "flip", "cut", "empty", "grow", "drop", "zeros", "swap", "folder", "pipe"),
    *("link inside", "link outside", "capitals", "moved", "hidden", "unreadable name"),
)
FIELDS = (
    *("edgeprune", "created", "model", "model.name", "model.structure_hash", "device", "device.name", "device.threads"),
    *(
        "device.streams",
        "device.hint",
        "device.precisions",
        "device.backend",
        "device.options",
        "fingerprint",
        "versions",
    ),
    *(
        "runtime",
        "runtime.name",
        "runtime.least",
        "layout",
        "engine",
        "engine.backend",
        "engine.precision",
        "engine.path",
    ),
    *(
        "engine.files",
        "engine.onnx",
        "engine.inputs",
        "engine.outputs",
        "engine.notes",
        "dense",
        "dense.path",
        "sparsity",
    ),
    *("parity", "parity.samples", "parity.tolerance", "latency", "attempts", "quality", "seconds", "notes", "files"),
)
WRONG: dict[str, tuple[Any, ...]] = {
    "dict": ([], "text", 1, True),
    "list": ({}, "text", 1, [[]]),
    "str": (1, [], {}, True),
    "int": ("1", 1.5, True, [], -1, 10**17),
    "float": ("1", True, []),
    "NoneType": (1, [], True),
}
"""For a value of a type what it may be no less than this."""
BEYOND: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("device.threads", "device.streams"), (0, -1, 1 << 40)),
    **dict.fromkeys(("device.hint", "device.backend", "engine.backend", "engine.precision"), ("other",)),
}
SHAPES = ([-1, 3], "wide", [1.5], [True], [10**17], None, {"0": 1})
JSON: dict[str, Callable[[str], str]] = {
    "no JSON": lambda text: text.replace(":", "=", 1),
    "a trailing comma": lambda text: text.rstrip().rstrip("}") + ",}",
    "a name twice": lambda text: text.replace('"schema": 1', '"schema": 1, "schema": 1', 1),
    "not a number": lambda text: text.replace('"schema": 1', '"schema": 1, "x": NaN', 1),
    "infinite": lambda text: text.replace('"schema": 1', '"schema": 1, "x": 1e999', 1),
    "5000 digits": lambda text: text.replace('"schema": 1', '"schema": 1, "x": ' + "9" * 5000, 1),
    "100000 deep": lambda text: text.replace('"schema": 1', '"schema": 1, "x": ' + "[" * 100000 + "]" * 100000, 1),
    "half a surrogate pair": lambda text: text.replace('"schema": 1', '"schema": 1, "x": "\\ud800"', 1),
    "a byte order mark": lambda text: "\ufeff" + text,
    "no text": lambda text: "",
    "a list": lambda text: "[" + text + "]",
    "17 MB": lambda text: text + " " * (17 << 20),
}


def files_of(folder: Path) -> list[Path]:
    """All that the manifest lists."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, SEAL))


def spoil_file(rng: random.Random, folder: Path) -> str:
    """Another content, or another thing under its name."""
    how = rng.choice(HOW)
    file = rng.choice([p for p in files_of(folder) if p.name != "run.py"])
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "empty":
        content.clear()
    elif how == "grow":
        content += bytes(rng.randrange(1, 9))
    elif how == "zeros":
        content[:16] = b"\x01" * 16 if content[:16] == bytes(16) else bytes(16)
    elif how == "swap":
        other = rng.choice([p for p in files_of(folder) if p.read_bytes() != content and p.name != "run.py"])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{how} {file.name} and {other.name}"
    if how in ("flip", "cut", "empty", "grow", "zeros"):
        file.write_bytes(content)
        return f"{how} {file.name}"
    aside = folder.parent / "outside"
    file.rename(aside)
    if how == "folder":
        file.mkdir()
        (file / "x").write_bytes(b"x")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link inside":
        (folder / "kept").write_bytes(content)
        file.symlink_to(folder / "kept")
    elif how == "link outside":
        file.symlink_to(aside)
    elif how in ("capitals", "moved", "hidden", "unreadable name"):
        names: dict[str, str | bytes] = {
            "capitals": file.name.upper(),
            "hidden": f".{file.name}",
            "moved": "other",
            "unreadable name": b"\xff\xfe",
        }
        where = names[how]
        raw = os.fsencode(file.parent) + b"/" + (where if isinstance(where, bytes) else os.fsencode(where))
        shutil.copyfile(aside, raw)
    return f"{how} {file.name}"


def add_something(rng: random.Random, folder: Path) -> str:
    """A file that a runtime or Python might find, a folder, a pipe, a link."""
    how = rng.choice(["file", "file", "file", "folder", "pipe", "link", "linked folder"])
    if how == "file":
        path = folder / rng.choice(STRAYS)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        return f"file {path.relative_to(folder)!s}".replace("\n", "\\n")
    path = folder / rng.choice(["extra", ".extra", "dense/extra"])
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/etc/hostname")
    else:
        shutil.move(folder / "dense", folder.parent / "elsewhere")
        (folder / "dense").symlink_to(folder.parent / "elsewhere")
    return f"{how} {path.relative_to(folder)}"


def spoil_manifest(rng: random.Random, folder: Path) -> str:
    """The manifest or its hash, one without the other."""
    path, seal = folder / MANIFEST, folder / SEAL
    how = rng.choice(["flip", "flip", "flip", "cut", "spaces", "drop", "link", "folder", "pipe", "number", "seal"])
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "spaces":  # the same document
        path.write_text(json.dumps(json.loads(content)))
    elif how == "number":
        document = json.loads(content)
        document["parity"]["tolerance"] = 1e9
        path.write_text(json.dumps(document, indent=2) + "\n")
    elif how == "seal":
        how = f"seal {rng.choice(['drop', 'capitals', 'grow', 'zeros', 'link'])}"
        text = seal.read_text()
        changed = {"seal capitals": text.upper(), "seal grow": text + text, "seal zeros": "0" * 64 + text[64:]}
        seal.unlink()
        if how in changed:
            seal.write_text(changed[how])
        elif how == "seal link":
            (folder.parent / "outside").write_text(text)
            seal.symlink_to(folder.parent / "outside")
    else:
        path.rename(folder.parent / "outside")
        if how == "link":
            path.symlink_to(folder.parent / "outside")
        elif how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
    return how


def write_sealed(folder: Path, text: str) -> None:
    """A manifest with its hash: what is wrong with it has to be found in what it says."""
    data = text.encode("utf-8", "surrogatepass")
    (folder / MANIFEST).write_bytes(data)
    (folder / SEAL).write_bytes(seal_of(data))


def spoil_json(rng: random.Random, folder: Path) -> str:
    """With its hash: JSON that is none, or that says one thing to one reader and another to the next."""
    how = rng.choice(sorted(JSON))
    write_sealed(folder, JSON[how]((folder / MANIFEST).read_text(encoding="utf-8")))
    return how


def spoil_names(rng: random.Random, folder: Path) -> str:
    """With its hash: names and hashes of files, and the paths of the engine."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files: Document = document["files"]
    victim, other = rng.sample(sorted(files), 2)
    (folder.parent / "outside").write_bytes(b"x")
    name = rng.choice(NAMES)
    how = rng.choice(["add", "rename", "engine", "engine", "swap", "hash", "bytes", "forget", "capitals"])
    if how == "add":
        files[name] = {"sha256": "0" * 64, "bytes": 1}
    elif how == "rename":
        files[name] = files.pop(victim)
    elif how == "engine":
        key = rng.choice(["engine", "dense"])
        name = rng.choice([name, "plan.json", "dense/model.xml" if key == "engine" else "model.xml"])
        document[key]["path"] = name
        if rng.random() < 0.5:
            document[key]["files"] = [name]
    elif how == "swap":
        files[victim], files[other] = files[other], files[victim]
    elif how == "hash":
        digest = files[victim]["sha256"]
        files[victim]["sha256"] = rng.choice([digest.upper(), digest[:-1], "0" * 64, digest[::-1], "", digest + "0"])
    elif how == "bytes":
        files[victim]["bytes"] = rng.choice([-1, 0, 1, 10**17, 1.5, "1", True, None])
    elif how == "forget":
        del files[victim]
    else:
        files[victim.upper()] = dict(files[victim])
    write_sealed(folder, json.dumps(document, indent=2))
    return f"{how} {name if how in ('add', 'rename', 'engine') else victim!r}".replace("\n", "\\n")[:60]


def spoil_fields(rng: random.Random, folder: Path) -> str:
    """With its hash: a field that is missing, of another type, or beyond what it can be."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    place = rng.choice((*FIELDS, "schema", "shape"))
    *above, key = place.split(".")
    holder = document
    for step in above:
        holder = holder[step]
    if place == "schema":
        holder[key] = rng.choice([0, 2, "1", 1.0, True, None, [1], 10**17])
    elif place == "shape":
        document["engine"]["inputs"][0]["shape"] = rng.choice(SHAPES)
    elif rng.random() < 0.25:
        del holder[key]
    else:
        kind = type(holder[key])
        other_types = [value for value in WRONG[kind.__name__] if not (kind is int and type(value) is int)]
        holder[key] = rng.choice([*other_types, *BEYOND.get(place, ())])
    write_sealed(folder, json.dumps(document, indent=2))
    return place


MUTATIONS: dict[str, Callable[[random.Random, Path], str]] = {
    "a file changed": spoil_file,
    "something added": add_something,
    "manifest or its hash": spoil_manifest,
    "JSON, with its hash": spoil_json,
    "names, with their hash": spoil_names,
    "fields, with their hash": spoil_fields,
}


def spoiled(whole: Path, into: Path, seed: int) -> tuple[Path, str, str]:
    """A spoiled copy: its folder, the kind of mutation, and what was done."""
    rng = random.Random(seed)
    kind = sorted(MUTATIONS)[seed % len(MUTATIONS)]
    folder = Path(shutil.copytree(whole, into / str(seed) / "net"))
    return folder, kind, MUTATIONS[kind](rng, folder)


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
