"""What a person asks for: a latency, a rate, or a share of the dense model's latency."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgeprune.errors import InputError

Kind: TypeAlias = Literal["latency", "rate", "ratio", "count", "bytes"]
EXAMPLES = "8ms, 0.5s, 900us, 120fps, 0.6x or 60%"
QUANTITIES = ("params", "macs")
"""What a budget may be of beside a latency: elements (or bytes) of the parameters, multiply-adds."""
AMOUNTS = {"params": "500k, 2M, 2MB, 1.5MiB, 0.5x or 50%", "macs": "300M, 1.2G, 0.5x or 50%"}
_MS_PER_UNIT = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmg]?)(i?)(b?)", re.IGNORECASE)
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(x|%)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}
_OTHERS = {
    "memory": "the peak of the activations is a maximum over time, no sum of parts",
    "energy": "no device here measures it",
}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([+-]?[0-9]+))?\s*(us|µs|μs|ms|s|fps|x|%)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`value` is in milliseconds (latency), inferences of one sample a second (rate), 1 (ratio to dense), or counts a
    quantity of `QUANTITIES` (count, bytes).
    """

    kind: Kind
    value: float

    def limit_ms(self, dense_ms: float | None = None, batch: int = 1) -> float:
        """The latency in ms that one inference of `batch` samples may take; a ratio needs the dense latency."""
        if self.kind == "latency":
            return self.value
        if self.kind == "rate":
            return batch / self.value * 1e3
        if self.kind in ("count", "bytes"):
            raise ValueError(f"{self} is no latency")
        if dense_ms is None:
            raise ValueError("a ratio budget needs the dense latency")
        return self.value * dense_ms

    def limit_of(self, dense: float) -> float:
        """The limit of a quantity of which the dense model has `dense`, in the same unit."""
        if self.kind in ("latency", "rate"):
            raise ValueError(f"{self} is a latency")
        return self.value * dense if self.kind == "ratio" else self.value

    def __str__(self) -> str:
        if self.kind in ("count", "bytes"):
            return _amount(self.value) + ("B" if self.kind == "bytes" else "")
        return f"{self.value:g}" + {"latency": " ms", "rate": " fps", "ratio": "x"}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One budget and what it is of: a device's name, one of `QUANTITIES`, or "" for the device that is asked for."""

    budget: Budget
    of: str = ""

    def __str__(self) -> str:
        return f"{self.budget} of {self.of}" if self.of else str(self.budget)


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


def parse_wanted(text: str) -> Wanted:
    """`8ms`, `8ms@DEVICE`, `2MB@params`, `0.5x@macs`; `InputError` says what is wrong with anything else."""
    amount, at, of = (part.strip() for part in text.rpartition("@"))
    if not at:
        return Wanted(budget=parse_budget(text))
    if not of:
        raise InputError(f"budget '{text}' names nothing behind the @; write a device, {' or '.join(QUANTITIES)}")
    if of in _OTHERS:
        raise InputError(
            f"budget '{text}' can't be kept: {_OTHERS[of]}; budgets are of {_named(QUANTITIES)} or a device"
        )
    return Wanted(budget=_parse_amount(text, amount, of) if of in QUANTITIES else parse_budget(amount), of=of)


def check_wanted(wanted: Iterable[Wanted], device: str = "") -> None:
    """`InputError` where two budgets are of the same thing; `device` is the name of the one that "" stands for."""
    seen: dict[str, Wanted] = {}
    for each in wanted:
        of = each.of or device
        if of in seen:
            raise InputError(f"two budgets of {of or 'the latency'}: {seen[of].budget} and {each.budget}; give one")
        seen[of] = each


def _parse_amount(text: str, amount: str, of: str) -> Budget:
    share, found = _SHARE.fullmatch(amount), _AMOUNT.fullmatch(amount)
    if share is not None:
        value = float(share[1]) / (100 if share[2] == "%" else 1)
        if not 0 < value <= 1:
            raise InputError(f"budget '{text}' must be above 0 and at most 1x of the dense model's {of}")
        return Budget(kind="ratio", value=value)
    is_bytes = found is not None and bool(found[4])
    if found is None or (found[3] and not is_bytes) or (is_bytes and of != "params"):
        raise InputError(f"budget '{text}' is no amount of {of}; write it like {AMOUNTS[of]}, then @{of}")
    value = float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]
    if not 0 < value < math.inf:
        raise InputError(f"budget '{text}' must be above 0 and finite")
    return Budget(kind="bytes" if is_bytes else "count", value=value)


def _amount(value: float) -> str:
    """1500000 as `1.5M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"@{name}" for name in names)
