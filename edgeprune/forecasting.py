"""What a profile would measure, as far as that is known before it does: its first grid, and what need would add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeprune.cost import cost_model
from edgeprune.device import Device
from edgeprune.graph import ModelGraph
from edgeprune.kernel import Kernel
from edgeprune.preparing import kernels_to_profile, node_latencies
from edgeprune.profiling import known_table, missing_kernels
from edgeprune.sampling import BATCH, MOST_ROUNDS, foreseen_rounds
from edgeprune.staircase import find_staircase, staircase_kernels
from edgeprune.table import LatencyTable, without_networks

SECONDS_EACH = 0.12  # building, loading and the shortest bursts of one kernel
RUNS_EACH = 50
SECONDS_MODELLED = 0.01
MACS_PER_SECOND = 30e9  # a guess, where the table has no kernel of an operator


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Kernels that a profile would measure, in the order in which it decides about them.

    `grid` counts those asked for in any case, `missing` are the ones of them that the table lacks. Then come rounds by
    need: `following` is the first, which the table decides; `expected` counts all of them if every measurement comes
    out as predicted. Both are None where the grid has to be measured before anything can be said. `at_most` come by
    need. `seconds` are for what is missing and expected, `most_seconds` for `at_most`; `paced_by` counts the tabled
    kernels that they were derived from. `unknown` says what can't be told before measuring.
    """

    grid: int
    missing: tuple[Kernel, ...]
    following: tuple[Kernel, ...] | None
    expected: int | None
    at_most: int
    seconds: float
    most_seconds: float
    paced_by: int
    unknown: tuple[str, ...]


def forecast(graphs: Sequence[ModelGraph], device: Device, *, retry_failed: bool = False) -> Forecast:
    """What `profile` of the device's staircase and of these graphs would measure; measures nothing."""
    precision = device.precisions[0]
    table = known_table(device, precision)
    stairs = staircase_kernels(precision)
    steps = find_staircase(node_latencies(table), precision).steps()
    grids = [kernels_to_profile(graph, device, steps) for graph in graphs]
    wanted = sorted(set(stairs).union(*grids))
    missing = missing_kernels(table, wanted, retry_failed)
    no_stairs = missing_kernels(table, stairs, retry_failed)
    known: set[Kernel] = {*table.entries, *table.failures}
    rounds: list[tuple[Kernel, ...]] = []
    unfinished = at_most = 0
    for graph, grid in zip(graphs, grids, strict=True):
        if missing_kernels(table, grid, retry_failed):
            unfinished, at_most = unfinished + 1, at_most + MOST_ROUNDS * BATCH
        elif more := foreseen_rounds(cost_model(graph, without_networks(table)), dict.fromkeys(known)):
            rounds, at_most = [*rounds, *more], at_most + MOST_ROUNDS * BATCH
            known.update(*more)
    needed = [kernel for kernels in rounds for kernel in kernels]
    seconds = seconds_for([*missing, *needed], table, device)
    each_s = seconds_for(wanted, table, device) / len(wanted)
    return Forecast(
        grid=len(wanted),
        missing=tuple(missing),
        following=None if unfinished else rounds[0] if rounds else (),
        expected=None if unfinished else len(needed),
        at_most=at_most,
        seconds=seconds,
        most_seconds=seconds + each_s * (at_most - len(needed)),
        paced_by=len(table),
        unknown=tuple(_unknown(table, device, stairs=not no_stairs, unfinished=unfinished, rounds=len(rounds))),
    )


def seconds_for(kernels: Iterable[Kernel], table: LatencyTable, device: Device) -> float:
    """About how long measuring takes: at the pace of the tabled kernels of each operator, guessed where none is."""
    listed = list(kernels)
    if device.modelled:
        return SECONDS_MODELLED * len(listed)
    macs: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for entry in table:
        operator = entry.kernel.operator
        macs[operator] = macs.get(operator, 0.0) + entry.kernel.macs
        seconds[operator] = seconds.get(operator, 0.0) + table.latency_us(entry.kernel) / 1e6
    pace = {operator: macs[operator] / seconds[operator] for operator in macs if macs[operator]}
    return sum(SECONDS_EACH + RUNS_EACH * k.macs / pace.get(k.operator, MACS_PER_SECOND) for k in listed)


def _unknown(table: LatencyTable, device: Device, *, stairs: bool, unfinished: int, rounds: int) -> Iterable[str]:
    """What the numbers of a forecast can't say, one sentence each; `stairs` says that the staircase is in the table."""
    if unfinished and not stairs:
        yield "the grid's widths: they lie on the device's staircase, which comes first; steps of 8 are assumed"
    if unfinished:
        yield "how many kernels come by need: that follows from the times of the grid"
    elif rounds > 1:
        yield "which kernels come by need after the next ones: counted as if all times came out as predicted"
    if not device.modelled:
        if not len(table):
            yield "the device's speed: no kernel is in the table"
        yield f"how long the runtime takes to build a kernel: {SECONDS_EACH:g} s each are assumed beside the runs"
