"""What a person asks for: a latency, a rate, or a share of the dense model's latency."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgeprune.errors import InputError

Kind: TypeAlias = Literal["latency", "rate", "ratio"]
EXAMPLES = "8ms, 0.5s, 900us, 120fps, 0.6x or 60%"
_MS_PER_UNIT = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([+-]?[0-9]+))?\s*(us|µs|μs|ms|s|fps|x|%)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`value` is in milliseconds (latency), inferences of one sample a second (rate) or 1 (ratio to dense)."""

    kind: Kind
    value: float

    def limit_ms(self, dense_ms: float | None = None, batch: int = 1) -> float:
        """The latency in ms that one inference of `batch` samples may take; a ratio needs the dense latency."""
        if self.kind == "latency":
            return self.value
        if self.kind == "rate":
            return batch / self.value * 1e3
        if dense_ms is None:
            raise ValueError("a ratio budget needs the dense latency")
        return self.value * dense_ms

    def __str__(self) -> str:
        return f"{self.value:g}" + {"latency": " ms", "rate": " fps", "ratio": "x"}[self.kind]


def parse_budget(text: str) -> Budget:
    """`8ms`, `0.5s`, `900us`, `120fps`, `0.6x` or `60%`; `InputError` says what is wrong with anything else."""
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        raise InputError(f"budget '{text}' {_what_is_wrong(text.strip())}; write it like {EXAMPLES}")
    value, unit = float(f"{found[1]}e{found[2] or 0}"), found[3].lower()
    if not 0 < value < math.inf:
        raise InputError(f"budget '{text}' must be above 0 and finite; write it like {EXAMPLES}")
    if unit == "fps":
        return Budget(kind="rate", value=value)
    if unit in ("x", "%"):
        ratio = value / 100 if unit == "%" else value
        if ratio > 1:
            raise InputError(
                f"budget '{text}' is a share of the dense model's latency and must be at most 1x: "
                "nothing slower than the dense model is ever handed over"
            )
        return Budget(kind="ratio", value=ratio)
    return Budget(kind="latency", value=value * _MS_PER_UNIT[unit])


def _what_is_wrong(text: str) -> str:
    if not text:
        return "is empty"
    if re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        return "has no unit"
    if text.startswith("-"):
        return "is negative"
    number = re.match(r"[0-9.]+(e[+-]?[0-9]+)?", text, re.IGNORECASE)
    return f"has an unknown unit '{text[number.end() :].strip()}'" if number else "doesn't start with a number"
