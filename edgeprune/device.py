"""Devices: the entries of devices.yaml, read so that every fault is reported, with its line, at once."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    StrictInt,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from edgeprune.backends import backend_names, find_backend
from edgeprune.errors import DeviceError, InputError, did_you_mean
from edgeprune.folders import config_dir
from edgeprune.roofline import Roofline

SCHEMA = 1
SHIPPED = Path(__file__).with_name("devices.yaml")

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
_Positive = Annotated[StrictInt, Field(ge=1)]
_Cpu = Annotated[StrictInt, Field(ge=0)]
_Place: TypeAlias = tuple[str | int, ...]  # keys and indices that lead to a value


def _backend(name: str) -> str:
    known = backend_names()
    if name not in known:
        raise ValueError(f"no backend '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    return name


def _scalar(value: object) -> object:
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"expected text, a number or a truth value, found {value!r}")
    return value


_Scalar = Annotated[bool | int | float | str, PlainValidator(_scalar)]


def _word(value: str) -> str:
    """Text that goes into a command line: it can be taken for no option, and ends no line and no word."""
    if not value or value.startswith("-") or len(value) > 1000:
        raise ValueError(f"must not be empty, nor start with '-', found {value[:100]!r}")
    if re.search(r"[\s\x00-\x1f\x7f]", value):
        raise ValueError(f"must not hold spaces or control characters, found {value!r}")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.@:%\[\]~+-]+", _word(value)):
        raise ValueError(f"must be a name of ~/.ssh/config, host or user@host, found {value!r}")
    return value


def _folder(value: str) -> str:
    """`/a/b`, `~/a` or `a/b` (in the home folder over there)."""
    if ".." in _word(value).split("/") or value.strip("/~.") == "":
        raise ValueError(f"must be a folder of edgeprune's own, without '..', found {value!r}")
    return value


def _name(value: str) -> str:
    """It becomes a folder's name and stands in command lines."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(f"a device's name is made of letters, digits, '.', '_' and '-', found {value[:100]!r}")
    return value


_Name = Annotated[str, AfterValidator(_name)]
_Word = Annotated[str, AfterValidator(_word)]
_Host = Annotated[str, AfterValidator(_host)]
_Folder = Annotated[str, AfterValidator(_folder)]


_ONLY_OF = {"host": "ssh", "user": "ssh", "port": "ssh", "ssh_config": "ssh", "serial": "adb"}


class Device(BaseModel, frozen=True, extra="forbid"):
    """How to reach one device and how its runtime is pinned: all of it is part of what a measurement means."""

    name: _Name
    description: str = ""
    transport: Literal["local", "ssh", "adb"] = "local"
    host: _Host | None = None  # of ssh: a name of ~/.ssh/config, or host
    user: _Host | None = None  # of ssh, unless ~/.ssh/config tells
    port: Annotated[StrictInt, Field(ge=1, le=65535)] | None = None  # of ssh, unless ~/.ssh/config tells
    ssh_config: str | None = None  # a file in the place of ~/.ssh/config
    serial: _Host | None = None  # of adb, where several devices are plugged in
    python: _Word = "python3"  # over there, 3.8 or later
    folder: _Folder | None = None  # of edgeprune's files over there; ~/.cache/edgeprune, or below /data/local/tmp
    cache_mb: Annotated[StrictInt, Field(ge=16)] = 512  # the most that models take there
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0  # the longest silence of the device program
    backend: Annotated[str, AfterValidator(_backend)]
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32",)  # the first is the default
    threads: _Positive = 1
    affinity: Annotated[tuple[_Cpu, ...], Field(min_length=1)] | None = None  # CPUs; None leaves it to the system
    streams: _Positive = 1
    hint: Literal["latency", "throughput"] = "latency"
    sparse: bool = False  # it has sparse tensor cores: layers may be 2:4
    options: dict[str, _Scalar] = {}  # what the backend alone understands
    fallbacks: tuple[Annotated[str, AfterValidator(_backend)], ...] = ()  # `devices probe` tries them after `backend`
    arch: Literal["aarch64", "armv7l", "x86_64"] | None = None  # as `uname -m` says it
    power_mode: str | None = None  # that measurements are meant for, as the device itself calls it
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")] | None = None  # of an NVIDIA GPU
    lock_clocks: bool = False  # hold the clocks while something is measured, where that is allowed
    roofline: Roofline | None = None  # of `precisions[0]`: times by its data sheet while there is no way to the device
    aliases: tuple[_Name, ...] = ()

    @model_validator(mode="after")
    def _own_fields(self) -> Device:
        for field, transport in _ONLY_OF.items():
            if getattr(self, field) is not None and self.transport != transport:
                raise ValueError(f"'{field}' is of transport {transport}, this device has {self.transport}")
        return self

    @property
    def remote(self) -> bool:
        """It is another machine than this one, or is reached like one."""
        return self.transport != "local"

    @property
    def at_hand(self) -> bool:
        """Its entry says how to reach it; whether it answers is another question."""
        if self.transport == "ssh":
            return self.host is not None
        return self.roofline is None or self.serial is not None

    @property
    def modelled(self) -> bool:
        """Its numbers come from a formula, not from a clock."""
        return self.roofline is not None or not self.computes

    @property
    def computes(self) -> bool:
        """Its engines hold weights and give outputs, somewhere if not here; those of the null device don't."""
        return not find_backend(self.backend).modelled


def in_precision(device: Device, precision: str | None) -> Device:
    """The device with that precision as its first, which is the one that counts; as it is without one.

    `InputError` where the device has it not.
    """
    if precision is None:
        return device
    check_precision(device, precision)
    others = (known for known in device.precisions if known != precision)
    return device.model_copy(update={"precisions": (precision, *others)})


def with_clocks(device: Device, *, held: bool) -> Device:
    """The device with its clocks `held` while something is measured; else as its entry has it."""
    return device.model_copy(update={"lock_clocks": True}) if held else device


def check_precision(device: Device, precision: str) -> None:
    """`InputError` where the device has it not."""
    if precision not in device.precisions:
        known = ", ".join(device.precisions)
        hint = "; weights are stored in half precision by `export --store fp16`" if precision == "fp16" else ""
        raise InputError(f"device '{device.name}' has no precision '{precision}' (known: {known}){hint}")


def load_device(name: str, path: Path | None = None, *, allow_modelled: bool = False) -> Device:
    """The device of that name or alias. One that is known by its data sheet alone has to be asked for knowingly."""
    return check_modelled(find_device(name, path), allow_modelled, asked=name)


def find_device(name: str, path: Path | None = None) -> Device:
    """The device of that name or alias, whether there is a way to it or not."""
    devices = load_devices(path)
    aliases = _aliases(devices, path)
    target = name if name in devices else aliases.get(name)
    if target is None:
        hint = did_you_mean(name, [*devices, *aliases])
        raise InputError(f"device '{name}' is not in {path or 'devices.yaml'}{hint} (known: {', '.join(devices)})")
    return devices[target]


def _aliases(devices: dict[str, Device], path: Path | None) -> dict[str, str]:
    """Aliases of presets hold for the user's entries that took their places; an entry's own come first."""
    shipped = {} if path else {alias: name for name, device in _shipped().items() for alias in device.aliases}
    return shipped | {alias: name for name, device in devices.items() for alias in device.aliases}


def check_modelled(device: Device, allow_modelled: bool, *, asked: str | None = None) -> Device:
    """The device, if there is a way to it, or if its latencies may come from its data sheet; else `DeviceError`.

    `asked` is the name that it was asked for by.
    """
    if device.at_hand:
        return device
    if device.roofline is not None and allow_modelled:
        return device.model_copy(update={"transport": "local", **dict.fromkeys(_ONLY_OF)})  # the formula runs here
    raise DeviceError(_unreachable(device, asked or device.name))


def _unreachable(device: Device, asked: str) -> str:
    """What was looked at, and what to set."""
    user = config_dir() / "devices.yaml"
    line = f"edgeprune devices add {asked} --host USER@HOST"
    where = f"neither {user} nor the presets" if user.is_file() else f"there is no {user}, and the presets don't"
    if device.transport == "ssh":
        text = f"no host to reach it by ({where} name one), so nothing was tried; set it: {line}"
    else:
        text = f"its entry knows a roofline and no way to it, so nothing was tried; set one: {line}"
    if device.roofline is None:
        return f"device '{asked}': {text} (there is no data sheet of it to model latencies from)"
    return (
        f"device '{asked}': {text}; or take latencies modelled from its data sheet ({device.roofline.conditions}): "
        "--allow-modelled (allow_modelled=True)"
    )


def load_devices(path: Path | None = None) -> dict[str, Device]:
    """The devices of one file; without one, the user's devices.yaml and what it doesn't replace of the shipped one."""
    if path is not None:
        return {name: _settled(device) for name, device in _read(path).items()}
    user = config_dir() / "devices.yaml"
    mine = _read(user) if user.is_file() else {}
    devices = mine | {name: device for name, device in _shipped().items() if name not in mine}
    return {name: _settled(device) for name, device in devices.items()}


@functools.cache
def _shipped() -> dict[str, Device]:
    return _read(SHIPPED)


def _settled(device: Device) -> Device:
    """A device keeps its roofline only while there is no way to it; one that can be reached is measured."""
    if device.roofline is None:
        return device
    if device.at_hand:
        return device.model_copy(update={"roofline": None})
    return device.model_copy(update={"precisions": device.precisions[:1]})


class _Faults:
    """What is wrong in one file, and the line of every value in it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[_Place, int] = {(): 1}
        self.found: dict[_Place, tuple[int, str]] = {}  # one for each value: a union reports each of its members

    def add(self, place: _Place, message: str) -> None:
        while place not in self.lines:
            place = place[:-1]
        self.found.setdefault(place, (self.lines[place], message))

    def at_line(self, line: int, message: str) -> None:
        self.found[("line", line, message)] = (line, message)

    def check(self) -> None:
        faults = sorted(self.found.values())
        if len(faults) == 1:
            raise InputError(faults[0][1], file=self.file, place=faults[0][0])
        if faults:
            listed = "".join(f"\n  {self.file}:{line}: {message}" for line, message in faults)
            raise InputError(f"{len(faults)} faults in {self.file}:{listed}")


def _read(file: Path) -> dict[str, Device]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not YAML: {error}", file=file) from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    return devices_of(text, file)


def devices_of(text: str, file: Path) -> dict[str, Device]:
    """The devices of a file's text, as they stand there; all faults in one `InputError`, with their lines."""
    faults = _Faults(file)
    document = _parse(text, faults)
    if not isinstance(document, dict):
        faults.add((), "expected 'schema' and 'devices'")
        document = {"schema": SCHEMA, "devices": {}}
    for key in document.keys() - {"schema", "devices"}:
        faults.add((key,), f"unknown key '{key}'{did_you_mean(key, ['schema', 'devices'])}")
    if document.get("schema") != SCHEMA:
        faults.add(("schema",), f"expected 'schema: {SCHEMA}', found {document.get('schema')!r}")
    entries = document.get("devices")
    if not isinstance(entries, dict):
        faults.add(("devices",), "'devices' must map names to devices")
        entries = {}
    devices = {name: device for name, entry in entries.items() if (device := _device(name, entry, faults))}
    _check_aliases(devices, faults)
    faults.check()
    return devices


def _device(name: str, entry: Any, faults: _Faults) -> Device | None:
    place: _Place = ("devices", name)
    if not isinstance(entry, dict):
        faults.add(place, f"device '{name}' must be a mapping, found {entry!r}")
        return None
    if "name" in entry:
        faults.add((*place, "name"), f"unknown key 'name': the name of this device is '{name}'")
    try:
        return Device.model_validate({**entry, "name": name})
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            where = ".".join(str(step) for step in fault["loc"]) or f"device '{name}'"
            if fault["type"] == "extra_forbidden":
                message = f"unknown key '{where}'{did_you_mean(where, set(Device.model_fields) - {'name'})}"
            elif fault["type"] == "missing":
                message = f"device '{name}' lacks '{where}'"
            elif fault["type"] == "value_error":
                message = f"{where}: {fault['ctx']['error']}"
            else:
                message = f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, found {fault['input']!r}"
            faults.add((*place, *fault["loc"]), message)
        return None


def _check_aliases(devices: dict[str, Device], faults: _Faults) -> None:
    taken = set(devices)
    for name, device in devices.items():
        for index, alias in enumerate(device.aliases):
            if alias in taken:
                faults.add(("devices", name, "aliases", index), f"alias '{alias}' names another device too")
            taken.add(alias)


def _parse(text: str, faults: _Faults) -> Any:
    """The text as plain dicts, lists and scalars; the nodes are read rather than loaded, to know the line of each."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(f"not YAML: {error.problem}", file=faults.file, place=line) from None
    except YAMLError as error:
        raise InputError(f"not YAML: {str(error).splitlines()[0]}", file=faults.file) from None
    seen: set[int] = set()

    def plain(node: Node, place: _Place) -> Any:
        faults.lines.setdefault(place, node.start_mark.line + 1)
        if not str(node.tag).startswith("tag:yaml.org,2002:"):
            faults.add(place, f"tag {node.tag} is not plain data")
        elif id(node) in seen:
            faults.add(place, "an alias (*) is not supported: write the value out")
        elif isinstance(node, MappingNode):
            seen.add(id(node))
            return mapping(node, place)
        elif isinstance(node, SequenceNode):
            seen.add(id(node))
            return [plain(item, (*place, index)) for index, item in enumerate(node.value)]
        else:
            return yaml.constructor.construct_object(node)
        return None

    def mapping(node: MappingNode, place: _Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            child = (*place, key)
            if not str(key_node.tag).endswith(":str"):
                faults.at_line(line, f'a name must be a string: write "{key}", in quotes')
            elif key in result:
                faults.at_line(line, f"'{key}' stands here twice, first in line {faults.lines[child]}")
            else:
                faults.lines[child] = line
                result[key] = plain(value_node, child)
        return result

    return None if root is None else plain(root, ())
