"""The front: one preparation, many budgets, each choice started from its neighbour's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from edgeprune.budget import Budget
from edgeprune.choice import Choice
from edgeprune.errors import BudgetError, InputError, RuntimeMissing, install_line
from edgeprune.plan_json import Plan
from edgeprune.preparing import Prepared, Task, prune

_FRONT = re.compile(r"([0-9.]+)x?:([0-9.]+)x?:([0-9]+)")
DIGITS = 4
"""Digits behind the point of a ratio, in names of files too."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget of the front, as a share of the predicted dense latency; no plan where it is out of reach."""

    ratio: float
    choice: Choice | None = None
    plan: Plan | None = None
    why: str = ""

    @property
    def file(self) -> str:
        """Name of its plan."""
        return f"plan_{self.ratio:g}.json"

    def to_json(self) -> dict[str, Any]:
        """One entry of front.json; null where there is no plan."""
        if self.choice is None:
            return {"ratio": self.ratio, "plan": None, "why": self.why}
        return {
            "ratio": self.ratio,
            "predicted_ms": round(self.choice.predicted_us / 1e3, 4),
            "predicted_error_ms": round(self.choice.error_us / 1e3, 4),
            "value": self.choice.solution.value,
            "gap": self.choice.gap,
            "exact_cost": self.choice.exact_cost,
            "dropped": list(self.choice.dropped),
            "budgets": [spent.to_json() for spent in self.choice.spent[1:]],
            "plan": self.file,
        }


def parse_front(text: str) -> tuple[float, ...]:
    """`0.3x:0.9x:10`: ten ratios from 0.3 to 0.9, evenly spaced, ascending; `InputError` for anything else."""
    found = _FRONT.fullmatch(text.replace(" ", ""))
    try:
        low, high, count = (float(found[1]), float(found[2]), int(found[3])) if found else (0.0, 0.0, 0)
    except ValueError:
        low, high, count = 0.0, 0.0, 0
    if not 0 < low < high <= 1 or count < 2:
        raise InputError(
            f"front '{text}' is not LOW:HIGH:COUNT with 0 < LOW < HIGH <= 1x and at least 2, like 0.3x:0.9x:10"
        )
    ratios = tuple(round(low + (high - low) * i / (count - 1), DIGITS) for i in range(count))
    if ratios[0] == 0 or len(set(ratios)) < count:
        raise InputError(f"front '{text}' has ratios that are the same, or zero, to {DIGITS} digits; ask for fewer")
    return ratios


def front(
    task: Task,
    prepared: Prepared,
    ratios: Sequence[float],
    on_point: Callable[[Point], None] | None = None,
) -> tuple[Point, ...]:
    """A plan for every ratio of the predicted dense latency, ascending; solved from the largest, each from the last.

    Points out of reach say why; `BudgetError` where all are.
    """
    points: list[Point] = []
    before: Choice | None = None
    for ratio in sorted(ratios, reverse=True):
        try:
            plan, before = prune(task, prepared, Budget(kind="ratio", value=ratio), before)
            points.append(Point(ratio=ratio, choice=before, plan=plan))
        except BudgetError as error:
            points.append(Point(ratio=ratio, why=str(error)))
        if on_point is not None:
            on_point(points[-1])
    if before is None:
        raise BudgetError(f"no budget of the front can be met: {points[0].why}")
    return tuple(reversed(points))


def check_drawing() -> None:
    """`RuntimeMissing` without matplotlib."""
    if find_spec("matplotlib") is None:
        raise RuntimeMissing(f"matplotlib is missing: {install_line('plot')}")


def draw_front(points: Sequence[Point], title: str) -> bytes:
    """A PNG: value against predicted latency, with the cost model's error bars. `RuntimeMissing` without matplotlib."""
    check_drawing()
    from matplotlib.figure import Figure

    chosen = [point.choice for point in points if point.choice is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [choice.predicted_us / 1e3 for choice in chosen],
        [choice.solution.value for choice in chosen],
        xerr=[choice.error_us / 1e3 for choice in chosen],
        fmt="o-",
        color="#1f4e79",
        capsize=3,
    )
    axes.set_xlabel("predicted latency (ms), 90 % interval")
    axes.set_ylabel("value")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
