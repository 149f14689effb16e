"""Ways to spoil a bundle, all seeded: files, what lies beside them, the manifest, and manifests with their hash."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.bundle_core import MANIFEST, SEAL, seal_of

Document = dict[str, Any]
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
