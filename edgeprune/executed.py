"""What an engine really computes in, by the runtime's own listing: a runtime without a kernel in int8 says nothing and
takes another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.measurement import Timing
from edgeprune.precision import shares_of
from edgeprune.transport import open_session

if TYPE_CHECKING:
    from edgeprune.device import Device
    from edgeprune.engine import Engine

TIMING = Timing(warmup_ms=20.0, min_rounds=4, max_rounds=4, max_seconds=5.0)
LISTED = 6


@dataclass(frozen=True, kw_only=True)
class Executed:
    """Share of the compute time in each precision, the largest first, and which nodes ran in another than was asked
    for: `name (type)`, the longest first."""

    asked: str
    shares: Mapping[str, float]
    others: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {"asked": self.asked, "shares": dict(self.shares), "others": list(self.others)}

    def __str__(self) -> str:
        told = ", ".join(f"{share:.1%} {name}" for name, share in self.shares.items())
        if not self.others:
            return f"computed in {told}"
        more = f" and {len(self.others) - LISTED} more" if len(self.others) > LISTED else ""
        return f"computed in {told}; not in {self.asked}: {', '.join(self.others[:LISTED])}{more}"


def executed(engine: Engine, device: Device) -> Executed | None:
    """Run an engine a few times and ask its runtime; None where that doesn't tell of all nodes."""
    with open_session(device, precision=engine.precision) as session:
        session.load("executed", engine.path, profile=True)
        session.measure(["executed"], timing=TIMING)
        times = session.node_times("executed")
    shares = shares_of(times)
    if times is None or shares is None:
        return None
    other = [node for node in times.nodes if node["compute"] and node["precision"] != engine.precision]
    other.sort(key=lambda node: -float(node["time_us"]))
    names = tuple(f"{node['name']} ({node['type']})" for node in other)
    return Executed(asked=engine.precision, shares=shares, others=names)
