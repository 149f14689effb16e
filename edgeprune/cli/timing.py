"""Options of the commands that measure, named like trtexec's, and how a measured pair is printed."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgeprune.latency import Latency
    from edgeprune.measurement import Timing
    from edgeprune.verifying import Verification

Command = TypeVar("Command", bound=Callable[..., Any])


def timing_options(function: Command) -> Command:
    """--warmup-ms, --duration-s and --min-iters."""
    for option in reversed(
        (
            click.option("--warmup-ms", type=click.FloatRange(0), help="Of each engine, untimed.  [default: 200]"),
            click.option("--duration-s", type=click.FloatRange(0.1), help="At most this long.  [default: 30]"),
            click.option(
                "--min-iters", type=click.IntRange(1), help="At least this many runs of each.  [default: 120]"
            ),
        )
    ):
        function = option(function)
    return function


def make_timing(
    warmup_ms: float | None, duration_s: float | None, min_iters: int | None, *, base: Timing | None = None
) -> Timing:
    """`base`, the confirmation run's timing unless told, with what was given in its place."""
    from dataclasses import replace

    timing = base or _confirmation()
    if warmup_ms is not None:
        timing = replace(timing, warmup_ms=warmup_ms)
    if duration_s is not None:
        timing = replace(timing, max_seconds=duration_s)
    if min_iters is not None:
        rounds = ceil(min_iters / timing.min_runs)
        timing = replace(timing, min_rounds=rounds, max_rounds=max(rounds, timing.max_rounds))
    return timing


def _confirmation() -> Timing:
    from edgeprune.verifying import CONFIRM

    return CONFIRM


def pair_lines(result: Verification) -> list[str]:
    """The latency table of one dense and pruned engine."""
    dense, pruned = result.dense, result.pruned
    rows = [f"  {modelled(result):<12}{'dense':<12}pruned"]
    for title, value in (("p50", "p50_ms"), ("p90", "p90_ms")):
        left = in_ms(getattr(dense, value)) if dense else "-"
        ratio = _ratio(pruned) if title == "p50" else ""
        rows.append(f"  {'latency ' + title:<12}{left:<12}{in_ms(getattr(pruned, value))}   {ratio}".rstrip())
    if result.predicted_ms is not None:
        off = f"{result.predicted_ms / pruned.p50_ms - 1:+.1%}"
        rows.append(f"  {'predicted':<12}{modelled(result):<12}{in_ms(result.predicted_ms)}   {off}")
    if result.parity is not None:
        rows.append(f"  {'parity':<12}{'':<12}{result.parity.error:.1e} of at most {result.parity.tolerance:g}")
    processes = f", {len(result.loaded)} processes" if len(result.loaded) > 1 else ""
    disturbed = f"{result.disturbed_rounds} of {result.rounds} rounds disturbed"
    rows.append(f"  {result.origin}, n={pruned.n}, {disturbed}{processes}")
    if result.met is not None:
        rows.append(f"  budget {result.budget}  {'MET' if result.met else 'MISSED'}   {result.why}")
    return rows


def modelled(result: Verification) -> str:
    """`modelled` where the numbers are, to stand beside them."""
    return result.origin if result.origin == "modelled" else ""


def _ratio(pruned: Latency) -> str:
    if pruned.ratio is None:
        return ""
    return f"{pruned.ratio.value:.3f}x [{pruned.ratio.low:.3f}, {pruned.ratio.high:.3f}]"


def in_ms(value: float) -> str:
    """For a person."""
    return f"{value:.3g} ms" if value < 0.1 else f"{value:.2f} ms"
