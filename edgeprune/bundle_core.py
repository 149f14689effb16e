"""Whether a folder is the bundle that was written. Standard library only, Python 3.8 or later, nothing of edgeprune.

`edgeprune` checks a bundle with this, and so does the bundle's own run.py, into which it is pasted. Nothing of a bundle
is loaded before `check_bundle` came back: manifest.json is the file that manifest.sha256 names, every other file is the
one that manifest.json names, and there is nothing else in the folder.

The hashes tell what was changed by accident or by somebody who could not change all of the bundle. They are no
signature: who can rewrite manifest.json and manifest.sha256 can write a bundle of his own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCHEMA = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
DENSE = "dense"
OWN = {
    *("plan.json", "weights.safetensors", "parity.safetensors", "preprocessing.json", "rebuild.sh", "run.py"),
}
"""What a bundle may hold beside its engines."""
MAX_MANIFEST_BYTES = 1 << 24
MAX_DIGITS = 18  # of a whole number: any size of a file
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # of a path; names that every file system takes
TEXT, NUMBER, WHOLE, MAPPING = (str,), (int, float), (int,), (dict,)
NOTHING = (type(None),)
TENSOR: dict[str, Any] = {"name": TEXT, "dtype": TEXT, "shape": [WHOLE]}
ENGINE: dict[str, Any] = {
    **{"backend": TEXT, "precision": TEXT, "path": TEXT, "files": [TEXT], "onnx": TEXT + NOTHING},
    **{"inputs": [TENSOR], "outputs": [TENSOR], "notes": {"*": TEXT}},
}
LATENCY: dict[str, Any] = {
    **{"percentile": NUMBER, "budget": TEXT + NOTHING, "budget_ms": NUMBER + NOTHING, "met": (bool, *NOTHING)},
    **{"why": TEXT, "origin": TEXT, "predicted_ms": NUMBER + NOTHING, "predicted_error_ms": NUMBER + NOTHING},
    **{"references_us": {"*": NUMBER}, "dense": MAPPING + NOTHING, "pruned": MAPPING, "parity": MAPPING + NOTHING},
}
DOCUMENT: dict[str, Any] = {
    **{"edgeprune": TEXT, "created": TEXT, "fingerprint": MAPPING, "versions": {"*": TEXT}},
    "model": {"name": TEXT, "structure_hash": TEXT, "dense_weights_sha256": TEXT},
    "device": {
        **{"name": TEXT, "backend": TEXT, "precisions": [TEXT], "threads": WHOLE, "streams": WHOLE, "hint": TEXT},
        **{"affinity": (list, *NOTHING), "options": {"*": (str, int, float, bool)}},
    },
    "runtime": {"name": TEXT, "version": TEXT + NOTHING, "least": TEXT + NOTHING},
    **{"layout": {"*": TEXT}, "engine": ENGINE, "sparsity": MAPPING, "parity": {"samples": WHOLE, "tolerance": NUMBER}},
    **{"attempts": [MAPPING], "quality": MAPPING, "seconds": {"*": NUMBER}, "notes": MAPPING},
    "files": {"*": {"sha256": TEXT, "bytes": WHOLE}},
}
"""What every manifest holds: a tuple is the types that a value may have, a mapping the keys that it must have (`*` is
any), a list what each of its entries is. More keys may stand beside them."""
OR_NULL: dict[str, Any] = {"dense": ENGINE, "latency": LATENCY}


class Refused(Exception):
    """Why a bundle is not loaded. `kind`: `input` (no bundle, or a faulty manifest), `tampered`, or `version`.

    `place` is the key of the manifest that is at fault.
    """

    def __init__(self, message: str, kind: str = "tampered", place: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.place = place


def check_bundle(folder: str) -> dict[str, Any]:
    """The manifest of a bundle all of whose files are those that were written; `Refused` with the reason otherwise."""
    document = read_manifest(folder)
    check_document(document)
    check_engines(document)
    check_files(folder, document["files"])
    check_purpose(document)
    return document


def read_manifest(folder: str) -> dict[str, Any]:
    """manifest.json, if it is the one whose hash stands in manifest.sha256; nothing in it is checked but its schema."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.lexists(path):
        raise Refused("%s is no bundle: it has no %s" % (folder, MANIFEST), "input")
    content = _content(path, MAX_MANIFEST_BYTES)
    document = parse_manifest(content)
    found = document.get("schema") if isinstance(document, dict) else document
    if not isinstance(document, dict) or type(found) is not int or found != SCHEMA:
        raise Refused("expected schema %d, found %.80r" % (SCHEMA, found), "input", "schema")
    seal = os.path.join(folder, SEAL)
    if not os.path.lexists(seal):
        raise Refused("%s is missing: it holds the hash of %s, without which no bundle is loaded" % (seal, MANIFEST))
    if _content(seal, 1 << 10) != seal_of(content):
        raise Refused("%s is not the file that was written: its SHA-256 is not the one in %s" % (path, SEAL))
    return document


def seal_of(manifest: bytes) -> bytes:
    """The one line of manifest.sha256, as `sha256sum -c` takes it."""
    return ("%s  %s\n" % (hashlib.sha256(manifest).hexdigest(), MANIFEST)).encode()


def parse_manifest(content: bytes) -> Any:
    """JSON, strictly: UTF-8, no name twice, no number that is none or has no end, no half of a surrogate pair."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError("%.200r stands there twice" % name)
            found[name] = value
        return found

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError("a number of %d digits" % len(text))
        return int(text)

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")) or value != value:
            raise ValueError("%.40s is no number" % text)
        return value

    try:
        document = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=whole,
            parse_float=number,
            parse_constant=lambda text: number("nan"),
        )
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused("not a manifest: %s" % (str(error) or type(error).__name__), "input") from None
    return document


def check_document(document: dict[str, Any]) -> None:
    """That every field has the type which `DOCUMENT` says."""
    wanted = dict(DOCUMENT)
    for key, spec in OR_NULL.items():
        wanted[key] = NOTHING if document.get(key, "") is None else spec
    for place, message in _faults(document, wanted, ""):
        raise Refused(message, "input", place)
    for name, entry in document["files"].items():
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise Refused("expected 64 hexadecimal digits", "input", "files.%s.sha256" % name)
        if entry["bytes"] < 0:
            raise Refused("a file of %d bytes" % entry["bytes"], "input", "files.%s.bytes" % name)
    device = document["device"]
    for key in ("threads", "streams"):
        if not 1 <= device[key] <= 1 << 16:
            raise Refused("expected a number from 1, found %d" % device[key], "input", "device." + key)
    if device["hint"] not in ("latency", "throughput"):
        raise Refused("expected latency or throughput, found %.80r" % device["hint"], "input", "device.hint")


def _faults(value: Any, wanted: Any, place: str) -> Iterator[tuple[str, str]]:
    """(key, message) of what is not as `wanted` says, in the order of the document."""
    if isinstance(wanted, tuple):
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            yield place, "expected %s, found %.80r" % (" or ".join(kind.__name__ for kind in wanted), value)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield place, "expected a list, found %.80r" % (value,)
            return
        for index, item in enumerate(value):
            for fault in _faults(item, wanted[0], "%s.%d" % (place, index)):
                yield fault
    elif not isinstance(value, dict):
        yield place, "expected a mapping, found %.80r" % (value,)
    else:
        for key in value if "*" in wanted else wanted:
            below = "%s.%s" % (place, key) if place else str(key)
            if key not in value:
                yield below, "is missing"
                continue
            for fault in _faults(value[key], wanted.get("*", wanted.get(key)), below):
                yield fault


def check_engines(document: dict[str, Any]) -> None:
    """That a runner is given files with a hash: the engine's beside the manifest, the dense engine's in `dense/`."""
    for key, at in (("engine", ""), ("dense", DENSE + "/")):
        engine = document[key]
        if engine is None:
            continue
        if engine["path"] not in engine["files"]:
            raise Refused("%s %r is not one of its files" % (key, engine["path"]), place="%s.path" % key)
        for name in engine["files"] + ([engine["onnx"]] if engine["onnx"] else []):
            if name not in document["files"]:
                raise Refused("the manifest names %r as part of an engine, but lists no hash of it" % name)
            if name in OWN or name[: len(at)] != at or "/" in name[len(at) :]:
                raise Refused("%r is not where the files of the %s are" % (name, key), place="%s.files" % key)
        if engine["backend"] != document["device"]["backend"]:
            told = (engine["backend"], document["device"]["backend"])
            raise Refused("an engine for %.80r, but a device that runs %.80r" % told, place="%s.backend" % key)
        if engine["precision"] not in document["device"]["precisions"]:
            raise Refused("%.80r is no precision of the device" % engine["precision"], place="%s.precision" % key)
        for tensor in engine["inputs"] + engine["outputs"]:
            if any(not 0 <= size < 1 << 31 for size in tensor["shape"]):
                raise Refused("a shape of %.80r" % (tensor["shape"],), "input", "%s.inputs" % key)


def check_purpose(document: dict[str, Any]) -> None:
    """That every file is an engine's, or one that a bundle has."""
    engines = [engine for engine in (document["engine"], document["dense"]) if engine is not None]
    known = OWN.union(*(engine["files"] for engine in engines))
    for name in document["files"]:
        if name not in known:
            raise Refused("the manifest lists %.200r, which is no part of a bundle" % name, place="files")


def check_files(folder: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """That the folder holds these files, as they were, and nothing else: no link, no file that a runtime might find."""
    for name in files:
        check_name(folder, name)
    folded: dict[str, str] = {}
    for name in files:
        if folded.setdefault(name.lower(), name) != name:
            raise Refused("the manifest names %r and %r: one file on some systems" % (folded[name.lower()], name))
    held = set(_held(folder, {parent for name in files for parent in _parents(name)}))
    for name, entry in files.items():
        path = os.path.join(folder, *name.split("/"))
        if name not in held:
            raise Refused("%s is missing; the manifest lists it" % path)
        size = os.lstat(path).st_size
        if size != entry["bytes"]:
            raise Refused("%s has %d bytes, the manifest says %d" % (path, size, entry["bytes"]))
        if sha256_of(path) != entry["sha256"]:
            raise Refused("%s is not the file of the manifest: its SHA-256 differs" % path)
    for name in sorted(held - set(files) - {MANIFEST, SEAL}):
        hint = (
            "an engine is built outside of the bundle" if name.endswith((".engine", ".plan", ".trt")) else "remove it"
        )
        raise Refused("%s is not in the manifest; a runtime might read it: %s" % (os.path.join(folder, name), hint))


def check_name(folder: str, name: str) -> None:
    """`Refused` unless it is the plain, relative name of a file in the bundle."""
    parts = name.split("/")
    if not name or name[0] == "/" or "\\" in name or ".." in parts or ":" in name:
        raise Refused("the manifest of %s names %.200r, which leaves the folder" % (folder, name))
    if name in (MANIFEST, SEAL) or len(parts) > 8 or not all(PART.fullmatch(part) for part in parts):
        raise Refused("the manifest of %s names %.200r; files are named by letters, digits, ._-" % (folder, name))


def _parents(name: str) -> list[str]:
    """`a/b/c` lies in `a` and `a/b`."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _held(folder: str, folders: set[str], at: str = "") -> Iterator[str]:
    """Names of all files below a folder; `Refused` for what is neither a plain file nor one of the `folders`."""
    try:
        entries = sorted(os.listdir(os.path.join(folder, at)))
    except OSError as error:
        raise Refused("cannot read %s: %s" % (os.path.join(folder, at), error.strerror)) from None
    for entry in entries:
        name = "%s/%s" % (at, entry) if at else entry
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise Refused("%r is a link that leaves the folder, or might: a bundle holds plain files" % path)
        if stat.S_ISDIR(mode):
            if name not in folders:
                raise Refused("%r is a folder that is not in the manifest; remove it" % path)
            for found in _held(folder, folders, name):
                yield found
        elif stat.S_ISREG(mode):
            yield name
        else:
            raise Refused("%r is no plain file" % path)


def sha256_of(path: str) -> str:
    """Hexadecimal, of a plain file; links are not followed."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _content(path: str, most: int) -> bytes:
    with _opened(path) as file:
        content: bytes = file.read(most + 1)
    if len(content) > most:
        raise Refused("%s has more than %d bytes" % (path, most))
    return content


def _opened(path: str) -> Any:
    """A plain file, open for reading. A pipe is not waited for."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if os.path.islink(path):
            raise Refused("%r is a link; a bundle holds plain files" % path) from None
        raise Refused("cannot read %s: %s" % (path, error.strerror)) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise Refused("%r is no plain file" % path)
    return os.fdopen(number, "rb")
