"""Devices: the entries of devices.yaml, read so that every fault is reported, with its line, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from edgeprune.backends import backend_names, find_backend
from edgeprune.errors import InputError, did_you_mean
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


class Device(BaseModel, frozen=True, extra="forbid"):
    """How to reach one device and how its runtime is pinned: all of it is part of what a measurement means."""

    name: str
    description: str = ""
    transport: Literal["local"] = "local"
    backend: Annotated[str, AfterValidator(_backend)]
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32",)  # the first is the default
    threads: _Positive = 1
    affinity: Annotated[tuple[_Cpu, ...], Field(min_length=1)] | None = None  # CPUs; None leaves it to the system
    streams: _Positive = 1
    hint: Literal["latency", "throughput"] = "latency"
    sparse: bool = False  # it has sparse tensor cores: layers may be 2:4
    options: dict[str, _Scalar] = {}  # what the backend alone understands
    roofline: Roofline | None = None  # for a device that is not at hand: times by its data sheet instead of a clock
    aliases: tuple[str, ...] = ()

    @field_validator("roofline")
    @classmethod
    def _one_precision(cls, roofline: Roofline | None, info: ValidationInfo) -> Roofline | None:
        if roofline is not None and len(info.data.get("precisions", ("",))) > 1:
            raise ValueError("a roofline is that of one precision, this device has several")
        return roofline

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


def check_precision(device: Device, precision: str) -> None:
    """`InputError` where the device has it not."""
    if precision not in device.precisions:
        known = ", ".join(device.precisions)
        raise InputError(f"device '{device.name}' has no precision '{precision}' (known: {known})")


def load_device(name: str, path: Path | None = None, *, allow_modelled: bool = False) -> Device:
    """The device of that name or alias. One that is known by its data sheet alone has to be asked for knowingly."""
    devices = load_devices(path)
    if name in devices:
        return check_modelled(devices[name], allow_modelled)
    for device in devices.values():
        if name in device.aliases:
            return check_modelled(device, allow_modelled)
    hint = did_you_mean(name, [*devices, *(alias for device in devices.values() for alias in device.aliases)])
    raise InputError(f"device '{name}' is not in {path or 'devices.yaml'}{hint} (known: {', '.join(devices)})")


def check_modelled(device: Device, allow_modelled: bool) -> Device:
    """The device; `InputError` where its latencies come from a data sheet and that was not allowed."""
    if device.roofline is not None and not allow_modelled:
        raise InputError(
            f"device '{device.name}' has no measured latencies, only modelled ones, from its data sheet: "
            "--allow-modelled (allow_modelled=True) takes them"
        )
    return device


def load_devices(path: Path | None = None) -> dict[str, Device]:
    """The devices of one file; without one, the user's devices.yaml and what it doesn't replace of the shipped one."""
    if path is not None:
        return _read(path)
    user = config_dir() / "devices.yaml"
    mine = _read(user) if user.is_file() else {}
    return mine | {name: device for name, device in _read(SHIPPED).items() if name not in mine}


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
    faults = _Faults(file)
    document = _parse(file, faults)
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
            where = ".".join(str(step) for step in fault["loc"])
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


def _parse(file: Path, faults: _Faults) -> Any:
    """The file as plain dicts, lists and scalars; the nodes are read rather than loaded, to know the line of each."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise InputError(f"not YAML: {error.problem}", file=file, place=line) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not YAML: {str(error).splitlines()[0]}", file=file) from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
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
