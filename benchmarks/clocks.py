"""What share of the dense network's latency a network takes: measured beside it, or by the cost model's word."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from edgeprune.calibration import Source, with_networks
from edgeprune.cost import CostModel, cost_model
from edgeprune.device import Device
from edgeprune.exporting import as_pruned, export
from edgeprune.graph import ModelGraph
from edgeprune.measurement import HOT
from edgeprune.preparing import Silent, measured_table
from edgeprune.references import load_references
from edgeprune.table import shipped_path, table_path
from edgeprune.transport import open_session


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network to be timed: as a module, and as the cost model's widths and dropped blocks."""

    module: torch.nn.Module
    widths: Mapping[str, int]
    dropped: tuple[str, ...] = ()


Clock: TypeAlias = Callable[[Mapping[str, Candidate]], dict[str, list[float]]]  # name to [ratio to dense, low, high]


def known_tables(device: Device) -> list[Path]:
    """The table that comes with edgeprune and the user's, in the device's first precision."""
    precision = device.precisions[0]
    return [shipped_path(device, precision), table_path(device, precision)]


def cost_of(graph: ModelGraph, model: torch.nn.Module, example: tuple[torch.Tensor, ...], device: Device) -> CostModel:
    """The cost model of the device's table, with whole networks; measures what the table lacks."""
    table = measured_table(graph, device, Silent())
    source = Source(model=model, graph=graph, example_inputs=example)
    return cost_model(graph, with_networks(table, cost_model(graph, table), source, device))


def predicted(cost: CostModel) -> Clock:
    """Ratios by the cost model's word, with its 90 % interval."""
    dense = cost.predict({}).us

    def clock(candidates: Mapping[str, Candidate]) -> dict[str, list[float]]:
        found = {}
        for name, each in candidates.items():
            told = cost.predict(each.widths, each.dropped)
            found[name] = [us / dense for us in (told.us, told.us - told.error_us, told.us + told.error_us)]
        return found

    return clock


def measured(model: torch.nn.Module, example: tuple[torch.Tensor, ...], device: Device) -> Clock:
    """Ratios measured in one session, in hot bursts that take turns with the dense network's; 95 % intervals."""

    def clock(candidates: Mapping[str, Candidate]) -> dict[str, list[float]]:
        modules = {name: each.module for name, each in candidates.items()} | {"dense": model}
        precision = device.precisions[0]
        with tempfile.TemporaryDirectory() as scratch:
            engines = {
                name: export(as_pruned(module, example), device, Path(scratch) / "engines" / name).path
                for name, module in modules.items()
            }
            with open_session(device, precision=precision) as session:
                references = load_references(session, device, precision, Path(scratch))
                for name, path in engines.items():
                    session.load(name, path)
                told = session.measure(list(engines), references, timing=HOT, seed=0)
        ratios = {name: told.ratio(name, "dense", told.disturbed()) for name in candidates}
        return {name: [ratio.value, ratio.low, ratio.high] for name, ratio in ratios.items()}

    return clock
