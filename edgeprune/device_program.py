"""Assembles the device program: the core loop and the needed runners in one self-contained file."""

from __future__ import annotations

import ast
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_parsing = threading.Lock()
"""Several threads that parse at once make some versions of Python fail (github.com/python/cpython/issues/106905)."""
CORE = Path(__file__).with_name("device_core.py")


@dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """Run as `python -I -u <file> <runner name>`; `hash` (12 hex digits) is what it answers to `hello`.

    On a remote device its models' folder and how many megabytes they may take there are two more arguments.
    """

    text: str
    hash: str


def assemble(runners: Mapping[str, Path]) -> DeviceProgram:
    """`runners` maps names to the `runner.py` of each backend."""
    with _parsing:
        sources = {name: self_contained(path) for name, path in sorted(runners.items())}
        body = self_contained(CORE)
    # lists of lines rather than one long string, so that a person can read the file on the device
    listed = "".join(
        f"    {name!r}: [\n" + "".join(f"        {line!r},\n" for line in source.splitlines()) + "    ],\n"
        for name, source in sources.items()
    )
    text = f"{body}\n\nRUNNERS = {{\n{listed}}}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    start = f'sys.exit(main({{name: "\\n".join(lines) for name, lines in RUNNERS.items()}}, {digest!r}))\n'
    return DeviceProgram(text=f"{text}\n\n{start}", hash=digest)


def self_contained(runner: Path) -> str:
    """A runner's source with the parts that it imports from its own folder pasted in: over there it is one file.

    A part is a module beside it, imported at the top by `from <package>.<folder>.<part> import name, ...`. All share
    one namespace on the device: a name that two of them define, or that is imported `as` another, is a `ValueError`.
    """
    pasted: list[Path] = []
    text = "\n".join(_lines(runner, pasted)) + "\n"
    defined = [name for path in [runner, *pasted] for name in _defined(path)]
    if twice := sorted({name for name in defined if defined.count(name) > 1}):
        raise ValueError(f"{runner}: its parts define {twice[0]} twice")
    return text


def _lines(path: Path, pasted: list[Path]) -> list[str]:
    """The lines of a file, those of its parts in the place of their first import."""
    source = path.read_text(encoding="utf-8")
    lines, kept, at = source.splitlines(), list[str](), 0
    inside = path in pasted
    for node in _statements(source):
        part = _part(node, path)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if part is None and not (inside and future):  # a runner's own stands at the top already
            continue
        kept += lines[at : node.lineno - 1]
        if part is not None and part not in pasted:
            pasted.append(part)
            kept += _lines(part, pasted)
        at = node.end_lineno or node.lineno
    return [*kept, *lines[at:]]


@cache
def _statements(source: str) -> list[ast.stmt]:
    """Parsed once: every session of a process has the same program."""
    return ast.parse(source).body


def _part(node: ast.stmt, path: Path) -> Path | None:
    """The file that a statement imports from, where that stands beside `path`."""
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return None
    *_, folder, part = ["", *node.module.split(".")]
    beside = path.with_name(f"{part}.py")
    if folder != path.resolve().parent.name or not beside.is_file():
        return None
    if any(alias.asname or alias.name == "*" for alias in node.names):
        raise ValueError(f"{path}:{node.lineno}: a part is imported by its names, none of them changed")
    return beside


def _defined(path: Path) -> set[str]:
    """Functions, classes and constants at the top of a file."""
    found = set()
    for node in _statements(path.read_text(encoding="utf-8")):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found
