"""Measure whole networks, the dense one and some cut at random, and write them into the device's latency table."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.cost import CostModel
from edgeprune.device import Device
from edgeprune.device_statistics import digits
from edgeprune.errors import Interrupted, UnstableError
from edgeprune.exporting import export
from edgeprune.graph import ModelGraph
from edgeprune.graph.structure import Node
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS, ConnectionLost, Measurement, NodeTimes, Timing, joined
from edgeprune.plan_json import Plan
from edgeprune.profiler import Profiler, statistics_of
from edgeprune.ranges import drawn_batches
from edgeprune.surgery import apply, positions_of
from edgeprune.table import LatencyTable, network_entries, read_table, table_path, table_paths
from edgeprune.table_lines import NetworkLine, UnitEntry
from edgeprune.table_log import open_log
from edgeprune.transport import MOST_CUTS
from edgeprune.units import multiple_near

LOG = logging.getLogger("edgeprune")
KINDS = (*("anywhere", "even", "offered") * 3, "without offered", "without even", *("between",) * 3)
"""How the networks of one structure are cut that are measured beside the dense one: `calibration_cuts`."""
DROPPED_SHARE = 0.4
LEAST_WIDTH_SHARE = 0.25
COMMON_SHARES = (0.3, 0.55, 0.4)
"""Where all groups of a network have about one share of their channels: independent ones make networks of one size."""
PROCESSES = 3
"""In each the networks are loaded in another order: the same file, loaded twice into one process, was 1 to 2 % faster
the second time on a machine with OpenVINO (six processes, timed by hand)."""
MOST_DISTURBED = 0.5
TIMING = Timing(
    warmup_ms=60.0,
    min_rounds=10,
    max_rounds=16,
    max_seconds=20.0,
    tolerance=0.004,
    burst_percentile=KERNELS.burst_percentile,
)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Channels that every group keeps, and ids of the blocks that are dropped."""

    widths: Mapping[str, int]
    dropped: tuple[str, ...] = ()

    def kernels(self, cost: CostModel) -> dict[str, Kernel]:
        """Of every unit that stays, by name."""
        gone = cost.vanishing(self.dropped)
        return {unit.name: unit.kernel(self.widths) for unit in cost.units if unit.name not in gone}

    def plan(self, graph: ModelGraph) -> Plan:
        """The first channels of every group: which ones makes no difference to latency."""
        hidden = {name for block in graph.blocks if block.id in self.dropped for name in block.inside}
        kept = {
            group.id: positions_of(graph, group.id, np.arange(self.widths[group.id], dtype=np.int64))
            for group in graph.groups
            if self.widths[group.id] < group.num_channels and group.id not in hidden
        }
        return Plan(structure_hash=graph.structure_hash, kept=kept, dropped=self.dropped)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What networks are cut from: the dense model, its graph and the inputs it is deployed with."""

    model: torch.nn.Module
    graph: ModelGraph
    example_inputs: tuple[torch.Tensor, ...]


def with_networks(
    table: LatencyTable,
    cost: CostModel,
    source: Source,
    device: Device,
    *,
    path: Path | None = None,
    on_network: Callable[[int, int], None] | None = None,
    wait_s: float = 0.0,
    engine_of: Callable[[Cut], Path] | None = None,
) -> LatencyTable:
    """The table with the networks of `calibration_cuts`; those that it lacks are measured and written to `path`.

    `engine_of` gives the engine of a cut where engines are kept; else each is exported, and deleted once measured.

    Which networks is fixed by the structure alone, so that a table answers the same question once (but for the table
    of another device: its networks are measured each time on this one). Where another process writes the table:
    `TableError` that names it, after waiting `wait_s` for it; what it measured is not measured again. Raises
    `UnstableError` where the reference kernels keep changing; `Interrupted` after a Ctrl-C.
    """
    if not missing_networks(table, cost):
        return table
    precision = device.precisions[0]
    own = path or table_path(device, precision)
    paths = [path] if path else table_paths(device, precision, table.fingerprint)
    with ExitStack() as stack:
        log = stack.enter_context(open_log(own, wait_s=wait_s))
        if wait_s:
            table = replace(table, networks=read_table(paths, table.fingerprint, allow_other=True).networks)
        missing = missing_networks(table, cost)
        if not missing:
            return table
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-networks-")))
        made = engine_of or partial(_exported, cost=cost, source=source, device=device, folder=folder)
        engines = []
        for number, cut in enumerate(missing):
            engines.append(made(cut))
            if on_network is not None:
                on_network(number + 1, len(missing))
        profiler = stack.enter_context(Profiler(device, precision, TIMING, wait_s))
        profiler.write_fingerprint(log)
        measured, nodes = _measured(profiler, engines)
        lines = [
            _line(profiler, cost, cut, _key(number), measured, nodes[number]) for number, cut in enumerate(missing)
        ]
        log.append([profiler.note_references(measured), *lines])
        fingerprint = profiler.fingerprint.short_hash
    if fingerprint != table.fingerprint:  # another device's kernels, asked for: ratios hold on its clock too
        return replace(table, networks=(*table.networks, *network_entries(lines)))
    return read_table(paths, fingerprint)


def _exported(cut: Cut, *, cost: CostModel, source: Source, device: Device, folder: Path) -> Path:
    pruned = apply(cut.plan(source.graph), source.model, source.example_inputs, graph=source.graph)
    engine = export(
        pruned,
        device,
        Path(tempfile.mkdtemp(prefix="network", dir=folder)) / "engine",
        kernels=list(cut.kernels(cost).values()),
        only_to_time=True,
        calibration=drawn_batches(source.example_inputs),
    )
    return engine.path


def missing_networks(table: LatencyTable, cost: CostModel) -> list[Cut]:
    """Those of `calibration_cuts` that the table does not hold."""
    structure = cost.graph.structure_hash
    known = [network.kernels for network in table.networks if network.structure == structure]
    return [cut for cut in calibration_cuts(cost) if cut.kernels(cost) not in known]


def _key(number: int) -> str:
    return f"network {number}"


def _measured(profiler: Profiler, engines: Sequence[Path]) -> tuple[Measurement, list[list[NodeTimes | None]]]:
    """All networks in one run, in `PROCESSES` processes; the node times of each network in every one of them."""
    keys = [_key(number) for number in range(len(engines))]
    parts: list[Measurement] = []
    nodes: list[list[NodeTimes | None]] = []
    try:
        for process in range(PROCESSES):
            if process:
                profiler.reopen()
            measured, told = _in_process(profiler, dict(zip(keys, engines, strict=True)), process)
            parts.append(measured)
            nodes.append([told.get(key) for key in keys])
    except KeyboardInterrupt:
        raise Interrupted("interrupted while whole networks were measured; the kernels are saved") from None
    return joined(parts), [list(times) for times in zip(*nodes, strict=True)]


def _in_process(
    profiler: Profiler, engines: Mapping[str, Path], process: int
) -> tuple[Measurement, dict[str, NodeTimes]]:
    """The networks in one process, in another order in each; from the start where the connection is lost."""
    for left in reversed(range(MOST_CUTS + 1)):
        try:
            references = profiler.load_references()
            for number in np.random.default_rng(process).permutation(len(engines)):
                key = list(engines)[number]
                profiler.session.load(key, engines[key], profile=True)
            measured = _quiet(profiler, list(engines), references, seed=process)
            return measured, profiler.session.node_times_of(list(engines))
        except ConnectionLost as error:
            if not left:
                raise
            LOG.warning("%s", error)
            profiler.reopen()
    raise AssertionError


def _quiet(profiler: Profiler, keys: Sequence[str], references: Sequence[str], seed: int) -> Measurement:
    """Once more where most rounds were disturbed."""
    for attempt in range(2):
        measured = profiler.session.measure(keys, references, timing=profiler.timing, seed=2 * seed + attempt)
        if len(measured.disturbed()) <= MOST_DISTURBED * len(measured.rounds[references[0]]):
            return measured
    raise UnstableError("the reference kernels kept changing during calibration: try when the device is idle")


def _line(
    profiler: Profiler,
    cost: CostModel,
    cut: Cut,
    key: str,
    measured: Measurement,
    nodes: Sequence[NodeTimes | None],
) -> NetworkLine:
    statistics: dict[str, Any] = statistics_of(key, measured)
    told = _node_ratios([unit_times(cost, cut, times) for times in nodes], statistics["reference_ratio"])
    return NetworkLine(
        structure=cost.graph.structure_hash,
        fingerprint=profiler.fingerprint.short_hash,
        session=profiler.id,
        units=[
            UnitEntry(name=name, kernel=kernel.to_json(), node_ratio=told.get(name))
            for name, kernel in cut.kernels(cost).items()
        ],
        **statistics,
    )


def _node_ratios(processes: Sequence[UnitTimes | None], ratio: float) -> dict[str, float]:
    """Each unit's share of the network's ratio, by name: the median over the processes that told it."""
    shares: dict[str, list[float]] = {}
    for times in processes:
        if times is not None:
            for name, us in times.unit_us.items():
                shares.setdefault(name, []).append(us / times.total_us)
    return {name: digits(float(np.median(values)) * ratio) for name, values in shares.items()}


def calibration_cuts(cost: CostModel) -> list[Cut]:
    """The dense network, some of random widths of three kinds in turn, and some without blocks.

    Every group anywhere; all groups near a share of `COMMON_SHARES` on the offered widths, as a solver would; every
    group anywhere on the offered widths. Those without blocks are of the last two kinds. And every group on multiples
    of 8, so that widths off a step of 16 or 32 are met by themselves: of those anywhere most are rough as well.
    """
    graph = cost.graph
    found = [Cut(widths=graph.dense_widths)]
    for seed, kind in enumerate(KINDS):
        if kind.startswith("without") and not graph.blocks:
            continue
        rng = np.random.default_rng(seed)
        common = COMMON_SHARES[seed // 3 % len(COMMON_SHARES)] if kind.endswith("even") else None
        low, high = (LEAST_WIDTH_SHARE, 1.0) if common is None else (common - 0.1, common + 0.1)
        widths = {}
        for group, options in sorted(cost.options.items()):
            width = max(graph.group(group).least_channels, round(rng.uniform(low, high) * graph.dense_widths[group]))
            if width < options[0] or kind not in ("anywhere", "between"):
                width = min(options, key=lambda option: abs(option - width))
            widths[group] = multiple_near(width, options) if kind == "between" else width
        cut = Cut(widths=widths, dropped=_some_blocks(graph, rng) if kind.startswith("without") else ())
        if cut not in found:
            found.append(cut)
    return found


def _some_blocks(graph: ModelGraph, rng: np.random.Generator) -> tuple[str, ...]:
    """Each with a chance of `DROPPED_SHARE`; the first where none was drawn.

    None with a stride, where there are others: left alone, a strided shortcut makes OpenVINO compute only every fourth
    pixel of the convolution before it, which teaches nothing about that convolution.
    """
    strided = {node.name for node in graph.nodes if max(_stride(node), default=1) > 1}
    blocks = [block for block in graph.blocks if not block.nodes & strided] or list(graph.blocks)
    drawn = [block.id for block in blocks if rng.uniform() < DROPPED_SHARE] or [blocks[0].id]
    return tuple(sorted(block.id for block in graph.outermost(drawn)))


def _stride(node: Node) -> tuple[int, ...]:
    stride = node.attributes.get("stride") or ()
    return (stride,) if isinstance(stride, int) else tuple(stride)


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """Time of each unit in us by name, on the clock of the run, which took `total_us`."""

    unit_us: Mapping[str, float]
    total_us: float


def unit_times(cost: CostModel, cut: Cut, nodes: NodeTimes | None) -> UnitTimes | None:
    """Lay every executed node at the door of the units that went into it, in proportion to their tabled times.

    What belongs to no unit stays in the total. Where the runtime tells what each node covers, a unit of which nothing
    was executed took no time; else it just goes by another name.
    """
    if nodes is None or nodes.total_us <= 0:
        return None
    units = {unit.name: unit for unit in cost.units if unit.name in cut.kernels(cost)}
    owner = {node: unit.name for unit in units.values() for node in unit.nodes} | {name: name for name in units}
    told = any(node.get("covers") for node in nodes.nodes)
    found = dict.fromkeys(units, 0.0) if told else {}
    for node in nodes.nodes:
        if not node["compute"]:
            continue
        names = node.get("covers") or [str(node["name"])]
        # runtimes add what they made of it: `fc/WithoutBiases`, `max_pool2d_nchwc`
        bases = [name.partition("/")[0].removesuffix("_nchwc") for name in names]
        owners = dict.fromkeys(owner[base] for base in bases if base in owner)
        tabled = {name: float(cost.unit_us(units[name], [cut.widths])[0]) for name in owners}
        every = sum(tabled.values())
        for name, us in tabled.items():
            share = us / every if every else 1 / len(tabled)
            found[name] = found.get(name, 0.0) + float(node["time_us"]) * share
    every = sum(float(node["time_us"]) for node in nodes.nodes)
    return UnitTimes(unit_us=found, total_us=max(nodes.total_us, every))
