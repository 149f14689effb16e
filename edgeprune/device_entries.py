"""The user's devices.yaml, written: entries added, changed and removed, all else in it kept as it stands.

Round trips go through ruamel.yaml, so comments and order stay. Nothing is written before the whole file was read again
from the text that it would hold; a fault is an `InputError` and the file is as it was.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from edgeprune.device import SHIPPED, Device, devices_of, load_devices
from edgeprune.errors import InputError, did_you_mean
from edgeprune.folders import config_dir, write_atomically

EMPTY = """\
# Devices of your own: they add to those that come with edgeprune, and an entry of the same name takes their place.
# `edgeprune devices add NAME --host USER@HOST` writes here, comments and order stay; `edgeprune devices show NAME`
# shows an entry. What the keys mean stands at the top of the file that comes with edgeprune.
schema: 1
devices: {}
"""


def own_file() -> Path:
    """The user's devices.yaml; it may not exist yet."""
    return config_dir() / "devices.yaml"


def add_entry(
    name: str, *, like: str | None = None, host: str | None = None, settings: Mapping[str, str] | None = None
) -> Device:
    """Write an entry of the user's, or change the given keys of one that is there; gives it as it now stands.

    A new one is a copy of `like`, or of the preset that has this name or alias. `settings` are keys (`options.device`)
    and their values as YAML; `null` takes a key away.
    """
    load_devices()  # its faults first: they are none of this change
    text = _own_text()
    document = _loaded(text)
    entries = document["devices"]
    if name in entries:
        if like is not None:
            raise InputError(f"device '{name}' stands in {own_file()} already: change its keys, or remove it first")
        entry = entries[name]
    else:
        entry = _copied(like or name, entries, name, bare="backend" in (settings or {}))
        entries.fa.set_block_style()
        entries[name] = entry
    if host is not None:
        entry["host"] = host
        if entry.get("transport", "local") == "local":
            entry["transport"] = "ssh"
    for key, value in (settings or {}).items():
        _set(entry, key, value)
    if entry.get("host") or entry.get("serial") or "precisions" in (settings or {}):
        entry.pop("roofline", None)  # it is measured, or the data sheet is that of another precision
    return _write(_dumped(document), f"device '{name}' was not written")[name]


def remove_entry(name: str) -> None:
    """Take an entry out of the user's file; a preset of that name counts again."""
    text = _own_text()
    entries = _loaded(text)["devices"]
    if name not in entries:
        where = "it comes with edgeprune" if name in load_devices() else "there is none of that name"
        raise InputError(f"device '{name}' is not in {own_file()}: {where}{did_you_mean(name, entries)}")
    _write(_without(text, entries, name), f"device '{name}' was not removed")


def entry_text(name: str) -> str:
    """An entry as it stands in its file, comments included: a YAML mapping of its name."""
    for text in (_own_text(), SHIPPED.read_text(encoding="utf-8")):
        entries = _loaded(text)["devices"]
        if name in entries:
            span = _span(text, entries, name)
            lines = text.splitlines(keepends=True)
            return dedent("".join(lines[span[0] : span[1]])) if span else _dumped(CommentedMap({name: entries[name]}))
    raise InputError(f"device '{name}' is not in devices.yaml")


def set_line(device: Device, pair: str) -> str:
    """The command that changes a key of a device's entry, `KEY=VALUE`; a preset's is copied first."""
    like = "" if is_own(device.name) else f" --like {device.name}"
    return f"edgeprune devices add {device.name}{like} --set {pair}"


def is_own(name: str) -> bool:
    """Whether the entry is the user's."""
    return name in _loaded(_own_text())["devices"]


def _own_text() -> str:
    file = own_file()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return EMPTY
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read it: {error}", file=file) from None


def _copied(template: str, own: CommentedMap, name: str, bare: bool) -> CommentedMap:
    """The entry to start from, without its aliases: a preset's stay with it. `bare` may start from nothing."""
    shipped = _loaded(SHIPPED.read_text(encoding="utf-8"))["devices"]
    named = {alias: key for key, entry in shipped.items() for alias in entry.get("aliases", ())}
    found = own.get(template) or shipped.get(template) or shipped.get(named.get(template, ""))
    if found is not None:
        copied: CommentedMap = deepcopy(found)
        copied.pop("aliases", None)
        return copied
    if bare and template == name:
        return CommentedMap()
    known = [*own, *shipped, *named]
    hint = did_you_mean(template, known)
    raise InputError(
        f"no preset '{template}'{hint} (known: {', '.join(known)}); name one with --like, or a runtime with "
        "--set backend=openvino"
    )


def _set(entry: CommentedMap, key: str, value: str) -> None:
    """One `key=value`; dots lead into `options` and `roofline`."""
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise InputError(f"--set {key}={value}: the value is not YAML: {str(error).splitlines()[0]}") from None
    *path, last = key.split(".")
    for step in path:
        entry = entry.setdefault(step, CommentedMap())
        if not isinstance(entry, dict):
            raise InputError(f"--set {key}={value}: '{step}' is no mapping")
    if parsed is None:
        entry.pop(last, None)
    else:
        entry[last] = parsed


def _loaded(text: str) -> CommentedMap:
    """The file with its comments; it was checked before, or is checked before anything is written."""
    try:
        document = _yaml().load(text)
    except YAMLError as error:
        raise InputError(f"not YAML: {str(error).splitlines()[0]}", file=own_file()) from None
    if not isinstance(document, CommentedMap) or not isinstance(document.get("devices"), CommentedMap):
        devices_of(text, own_file())  # says what is wrong
        raise InputError("'devices' must map names to devices", file=own_file())
    return document


def _dumped(document: CommentedMap) -> str:
    stream = io.StringIO()
    _yaml().dump(document, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _without(text: str, entries: CommentedMap, name: str) -> str:
    """The text without an entry's lines. ruamel.yaml would take the comment above the next entry along with it."""
    lines, span = text.splitlines(keepends=True), _span(text, entries, name)
    if span is None:
        document = _loaded(text)
        del document["devices"][name]
        return _dumped(document)
    if list(entries) == [name]:
        line = int(_loaded(text).lc.key("devices")[0])
        lines[line] = lines[line].replace("devices:", "devices: {}", 1)
    return "".join(lines[: span[0]] + lines[span[1] :])


def _span(text: str, entries: CommentedMap, name: str) -> tuple[int, int] | None:
    """First line of an entry and the one after its last; None where others stand in the same line."""
    first = {key: int(entries.lc.key(key)[0]) for key in entries}
    if entries.fa.flow_style() or len(set(first.values())) < len(first):
        return None
    lines = text.splitlines()
    end = min((line for line in first.values() if line > first[name]), default=len(lines))
    while end > first[name] + 1 and _is_between(lines[end - 1], int(entries.lc.key(name)[1])):
        end -= 1
    return first[name], end


def _is_between(line: str, column: int) -> bool:
    """A blank line, or a comment that stands no deeper than the names of the entries: it belongs to what follows."""
    content = line.lstrip(" ")
    return not content.strip() or (content.startswith("#") and len(line) - len(content) <= column)


def _write(text: str, failed: str) -> dict[str, Device]:
    """The file's devices, after it was written whole; `InputError` and nothing written where it has a fault."""
    try:
        devices = devices_of(text, own_file())
    except InputError as error:
        raise InputError(f"{failed}: with it, {error}") from None
    write_atomically(own_file(), text)
    return devices


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("threads=4", "options.device=GPU")` as a mapping; a pair without `=` is an `InputError`."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, found '{pair}'")
        settings[key] = value
    return settings
