"""The lines of a latency table, each one JSON object; `latency_tables/README.md` is the page about them."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgeprune.kernel import Kernel

MAX_LINE = 1 << 20
SCHEMA = 1
UNIT_US = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}

Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NodeMicroseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # 0: the runtime runs no node for it
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]


def _as_kernel(value: dict[str, Any]) -> dict[str, Any]:
    Kernel.from_json(value)
    return value


KernelJson = Annotated[dict[str, Any], AfterValidator(_as_kernel)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_line(self) -> str:
        document = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(document, separators=(",", ":")) + "\n"


class FingerprintLine(_Line):
    """Defines a hash."""

    type: Literal["fingerprint"] = "fingerprint"
    schema_: Literal[1] = Field(default=1, alias="schema")
    hash: Hash
    facts: dict[str, Any]

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class SessionLine(_Line):
    """One run of a device program. It may come again with more rounds: the last one of an id counts."""

    type: Literal["session"] = "session"
    schema_: Literal[1] = Field(default=1, alias="schema")
    id: str
    fingerprint: Hash
    started: str  # UTC, ISO 8601
    device: str
    references: dict[str, Microseconds]
    rounds: Count
    edgeprune: str
    machine: dict[str, Any] | None = None  # what the device told about itself at the start, where it is measured
    slowed: list[str] | None = None  # what slowed it down meanwhile: heat, a power limit, under-voltage

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


def _as_pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Interval = Annotated[tuple[float, float], BeforeValidator(_as_pair)]


class RowLine(_Line):
    """One measurement of one kernel. `reference_ratio` is the quantity that counts, times are those of that session."""

    type: Literal["row"] = "row"
    kernel: KernelJson
    fingerprint: Hash
    session: str
    n: Annotated[int, Field(ge=1)]  # timed runs
    median_us: Microseconds
    p90_us: Microseconds
    p99_us: Microseconds
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of the rounds, robust, relative
    node_us: NodeMicroseconds | None = None  # of the compute nodes alone
    device_us: Microseconds | None = None  # of the accelerator's compute, without transfers
    clock_mhz: Microseconds | None = None  # mean of the cores right after the measurement, where the device tells it
    gpu_clock_mhz: Microseconds | None = None  # likewise, of a GPU
    temperature_c: Annotated[float, Field(allow_inf_nan=False)] | None = (
        None  # of the hottest zone, the most in between
    )
    sparse: bool | None = None  # whether the runtime picked a sparse implementation; None where it doesn't tell
    ran_in: dict[str, Share] | None = None  # of the compute time in each precision, of a kernel that isn't fp32
    reference: str
    reference_ratio: Microseconds
    ratio_ci: Interval
    rounds: Annotated[int, Field(ge=1)]
    disturbed: Count
    context: Literal["isolated"] = "isolated"
    origin: Literal["measured", "modelled"]

    @model_validator(mode="after")
    def _is_in_order(self) -> RowLine:
        _check_order(self)
        return self

    @property
    def node_ratio(self) -> float | None:
        """Ratio of the compute node alone to the reference."""
        return None if self.node_us is None else self.reference_ratio * self.node_us / self.median_us


def _check_order(line: RowLine | NetworkLine) -> None:
    """`ValueError` where an interval or percentiles contradict themselves."""
    low, high = line.ratio_ci
    if not (math.isfinite(low) and low <= line.reference_ratio <= high < math.inf):
        raise ValueError(f"ratio_ci {list(line.ratio_ci)} does not hold reference_ratio {line.reference_ratio}")
    if not line.median_us <= line.p90_us <= line.p99_us:
        raise ValueError("median_us, p90_us and p99_us must ascend")


class FailureLine(_Line):
    """A kernel that the runtime could not build, load or run."""

    type: Literal["failure"] = "failure"
    kernel: KernelJson
    fingerprint: Hash
    session: str
    reason: str


class UnitEntry(BaseModel):
    """A unit of a network: its name, its kernel, and its time over the reference's where the runtime tells it."""

    name: str
    kernel: KernelJson
    node_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NetworkLine(_Line):
    """One measurement of a whole network, which teaches the cost model what isolated kernels miss."""

    type: Literal["network"] = "network"
    structure: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # hash, as in a plan
    fingerprint: Hash
    session: str
    units: Annotated[list[UnitEntry], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)]
    median_us: Microseconds
    p90_us: Microseconds
    p99_us: Microseconds
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    reference: str
    reference_ratio: Microseconds
    ratio_ci: Interval
    rounds: Annotated[int, Field(ge=1)]
    disturbed: Count
    origin: Literal["measured", "modelled"]

    @model_validator(mode="after")
    def _is_in_order(self) -> NetworkLine:
        _check_order(self)
        if len({unit.name for unit in self.units}) < len(self.units):
            raise ValueError("two units of one name")
        return self


class ImportedLine(_Line):
    """One cell of a table that other software measured: no reference ran beside it, so it is never one of the rows.

    `value` stands as it was written, in `unit`. What the source was is in the facts of the fingerprint.
    """

    type: Literal["imported"] = "imported"
    name: Annotated[str, Field(min_length=1, max_length=1000)]  # in the source's own words
    kernel: KernelJson | None = None  # where the name says one
    fingerprint: Hash
    value: Microseconds
    unit: Literal["ns", "us", "ms", "s"]
    flags: list[str] | None = None  # why the importer doubts it

    @property
    def latency_us(self) -> float:
        """Microseconds."""
        return self.value * UNIT_US[self.unit]


class UnknownSchema(ValueError):
    """A header line of another version of the format; what it defines (`name`) can't be relied on."""

    def __init__(self, version: object, name: object) -> None:
        super().__init__(f"written in schema {version!r}, this edgeprune reads {SCHEMA}; use the one that wrote it")
        self.name = str(name)


Line = FingerprintLine | SessionLine | RowLine | FailureLine | NetworkLine | ImportedLine
LINES: dict[str, type[Line]] = {
    "fingerprint": FingerprintLine,
    "session": SessionLine,
    "row": RowLine,
    "failure": FailureLine,
    "network": NetworkLine,
    "imported": ImportedLine,
}


def parse_line(line: bytes) -> Line:
    """`ValueError` that says what is wrong, in a few words."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE} bytes")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object: torn or corrupt") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    kind = LINES.get(str(document.get("type")))
    if kind is None:
        raise ValueError(f"unknown type {document.get('type')!r}")
    if "schema_" in kind.model_fields and document.get("schema", SCHEMA) != SCHEMA:
        raise UnknownSchema(document.get("schema"), document.get("id") or document.get("hash"))
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in fault["loc"])
        raise ValueError(f"{where}: {fault['msg']}" if where else str(fault["msg"])) from None
