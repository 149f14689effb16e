"""Correct a cost model by whole networks: the dense one and a few of random widths, measured node by node."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeprune.cost import CostModel, NetworkTiming, calibrate
from edgeprune.device import Device
from edgeprune.errors import UnstableError
from edgeprune.exporting import export
from edgeprune.graph import ModelGraph
from edgeprune.measurement import KERNELS, Measurement, NodeTimes, Timing
from edgeprune.plan_json import Plan
from edgeprune.profiling import COMPUTE, load_references
from edgeprune.surgery import apply, positions_of
from edgeprune.transport import open_session

NETWORKS = 3
"""Networks of random widths that are measured beside the dense one."""
LEAST_WIDTH_SHARE = 0.35
MOST_DISTURBED = 0.5
TIMING = Timing(
    warmup_ms=100.0,
    min_rounds=8,
    max_rounds=24,
    max_seconds=20.0,
    tolerance=0.01,
    burst_percentile=KERNELS.burst_percentile,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What networks are cut from: the dense model, its graph and the inputs it is deployed with."""

    model: torch.nn.Module
    graph: ModelGraph
    example_inputs: tuple[torch.Tensor, ...]


def calibrated(
    cost: CostModel,
    source: Source,
    device: Device,
    references_us: Mapping[str, float],
    *,
    seed: int = 0,
    on_network: Callable[[int, int], None] | None = None,
) -> CostModel:
    """The cost model corrected by the dense network and `NETWORKS` others; `references_us` is the table's clock."""
    widths = [dict(source.graph.dense_widths), *random_widths(cost.options, NETWORKS, seed)]
    precision = device.precisions[0]
    with (
        tempfile.TemporaryDirectory(prefix="edgeprune-calibration-") as scratch,
        open_session(device, precision=precision) as session,
    ):
        folder = Path(scratch)
        references = load_references(session, device, precision, folder)
        keys = []
        for number, chosen in enumerate(widths):
            engine = export(
                apply(first_channels(source.graph, chosen), source.model, source.example_inputs, graph=source.graph),
                device,
                folder / f"network{number}",
                kernels=[unit.kernel(chosen) for unit in cost.units],
            )
            keys.append(f"network {number}")
            session.load(keys[-1], engine.path, profile=True)
            if on_network is not None:
                on_network(number + 1, len(widths))
        for attempt in range(2):
            measured = session.measure(keys, references, timing=TIMING, seed=seed + attempt)
            if len(measured.disturbed()) <= MOST_DISTURBED * len(measured.rounds[references[0]]):
                break
        else:
            raise UnstableError("the reference kernels kept changing during calibration: try when the device is idle")
        nodes = [session.node_times(key) for key in keys]
    timings = [
        _timing(measured, key, chosen, unit_times(cost, chosen, times), references_us)
        for key, chosen, times in zip(keys, widths, nodes, strict=True)
    ]
    return calibrate(cost, timings)


def random_widths(options: Mapping[str, Sequence[int]], count: int, seed: int) -> list[dict[str, int]]:
    """For every group one of its offered widths above about a third, at random."""
    rng = np.random.default_rng(seed)
    return [
        {
            group: int(rng.choice([width for width in widths if width >= LEAST_WIDTH_SHARE * widths[-1]]))
            for group, widths in sorted(options.items())
        }
        for _ in range(count)
    ]


def first_channels(graph: ModelGraph, widths: Mapping[str, int]) -> Plan:
    """A plan that keeps the first channels of every group: which ones makes no difference to latency."""
    kept = {
        group.id: positions_of(graph, group.id, np.arange(widths[group.id], dtype=np.int64))
        for group in graph.groups
        if widths[group.id] < group.num_channels
    }
    return Plan(structure_hash=graph.structure_hash, kept=kept)


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """Time of each unit in us by name, on the clock of the run, which took `total_us`."""

    unit_us: Mapping[str, float]
    total_us: float


def unit_times(cost: CostModel, widths: Mapping[str, int], nodes: NodeTimes | None) -> UnitTimes | None:
    """Lay every executed node at the door of the units that went into it, in proportion to their tabled times.

    What belongs to no unit stays in the total. Where the runtime tells what each node covers, a unit of which nothing
    was executed took no time; else it just goes by another name.
    """
    if nodes is None or nodes.total_us <= 0:
        return None
    owner = {node: unit.name for unit in cost.units for node in unit.nodes} | {u.name: u.name for u in cost.units}
    units = {unit.name: unit for unit in cost.units}
    told = any(node.get("covers") for node in nodes.nodes)
    found = dict.fromkeys(units, 0.0) if told else {}
    for node in nodes.nodes:
        if not node["compute"]:
            continue
        names = node.get("covers") or [str(node["name"])]
        # runtimes add what they made of it: `fc/WithoutBiases`
        owners = dict.fromkeys(owner[base] for name in names if (base := name.partition("/")[0]) in owner)
        tabled = {name: float(cost.unit_us(units[name], [widths])[0]) for name in owners}
        every = sum(tabled.values())
        for name, us in tabled.items():
            share = us / every if every else 1 / len(tabled)
            found[name] = found.get(name, 0.0) + float(node["time_us"]) * share
    every = sum(float(node["time_us"]) for node in nodes.nodes)
    return UnitTimes(unit_us=found, total_us=max(nodes.total_us, every))


def _timing(
    measured: Measurement,
    key: str,
    widths: Mapping[str, int],
    times: UnitTimes | None,
    references_us: Mapping[str, float],
) -> NetworkTiming:
    """On the table's clock: ratios to the compute-bound reference times its time in the table."""
    total_us = measured.ratio(key, COMPUTE, measured.disturbed()).value * references_us[COMPUTE]
    scale = total_us / times.total_us if times is not None else 0.0
    unit_us = {name: us * scale for name, us in times.unit_us.items()} if times is not None else {}
    return NetworkTiming(widths=dict(widths), total_us=total_us, node_us=unit_us)
