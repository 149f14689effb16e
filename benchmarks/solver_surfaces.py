"""What a network's units cost at any widths, taken out of a measured latency table into a small file.

    python -m benchmarks.solver_surfaces resnet50 resnet101        # writes benchmarks/solver_<name>.json

Each unit: the groups that it reads and writes, the block that it goes with, its surface (the Gaussian process of
`edgeprune.surface`) and the correction that whole networks taught, both as plain numbers. `benchmarks.solver_problems`
makes selection problems of it without torch and without the table. The file is checked against the cost model here.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from math import prod
from typing import Any

import numpy as np

import edgeprune as ep
from benchmarks.clocks import known_tables
from benchmarks.prediction.networks import build
from benchmarks.solver_problems import FOLDER, unit_us
from edgeprune.cost import CostModel, cost_model
from edgeprune.graph import Block, ModelGraph, trace
from edgeprune.surface import Surface
from edgeprune.table import read_table
from edgeprune.unit import Unit
from edgeprune.units import shape_key

CHECKED = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--device", default="host-openvino")
    options = parser.parse_args()
    device = ep.load_device(options.device)
    for name in options.names:
        model, inputs = build(name)
        graph = trace(model, inputs)
        cost = cost_model(graph, read_table(known_tables(device), allow_other=True))
        document = snapshot(name, graph, cost, options.device)
        print(f"{name}: largest relative difference to the cost model {check(document, cost):.1e}")
        path = FOLDER / f"solver_{name}.json"
        path.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def snapshot(name: str, graph: ModelGraph, cost: CostModel, device: str) -> dict[str, Any]:
    """The document; groups and blocks by number."""
    numbers = {group.id: i for i, group in enumerate(graph.groups)}
    blocks = {block.id: i for i, block in enumerate(graph.blocks)}
    surfaces: dict[int, dict[str, Any]] = {}
    units = []
    for unit in cost.units:
        surface = cost.surfaces[shape_key(unit.dense)]
        surfaces.setdefault(id(surface), {"number": len(surfaces), **_plain(surface)})
        block = _unit_block(unit, cost)
        units.append(
            {
                "name": unit.name,
                "groups": [numbers[group] for group in unit.groups],
                "block": None if block is None else blocks[block.id],
                "surface": surfaces[id(surface)]["number"],
                "window": prod(unit.dense.window or (1,)),
                **_sizes(unit, cost),
                **_correction(unit, cost),
            }
        )
    return {
        "model": name,
        "device": device,
        "origin": cost.origin,
        "groups": [
            {"channels": g.num_channels, "block": blocks.get(graph.block_of.get(g.id, ""))} for g in graph.groups
        ],
        "least": [_least(g.id, cost) for g in graph.groups],
        "blocks": len(blocks),
        "overhead_us": cost.overhead_us,
        "units": units,
        "surfaces": [{k: v for k, v in surface.items() if k != "number"} for surface in surfaces.values()],
    }


def _unit_block(unit: Unit, cost: CostModel) -> Block | None:
    """The smallest block that takes the unit with it."""
    around = [block for block in cost.graph.blocks if unit.nodes & block.nodes]
    return min(around, key=lambda block: len(block.nodes), default=None)


def _least(group: str, cost: CostModel) -> int:
    return max(1, -(-cost.graph.dense_widths[group] // 8))


def _plain(surface: Surface) -> dict[str, Any]:
    stairs = surface.stairs.of(surface.kernel.family)
    return {
        "mean": surface.mean.tolist(),
        "size": surface.roughness.size,
        "octaves": surface.roughness.octaves,
        "worked": surface.worked.tolist(),
        "weights": [float(f"{weight:.9g}") for weight in surface.weights],
        "steps": [stairs.c_in, stairs.c_out],
        "ragged": [stairs.ragged_in, stairs.ragged_out],
    }


def _sizes(unit: Unit, cost: CostModel) -> dict[str, Any]:
    """Which of its groups is c_in, which c_out, as places in `groups`; None: a fixed size."""
    dense = cost.graph.dense_widths
    full = unit.sizes(dense)
    axes: list[int | None] = [None, None]
    for place, group in enumerate(unit.groups):
        fewer = unit.sizes({**dense, group: dense[group] - 1})
        changed = [axis for axis in (1, 2) if fewer[axis] != full[axis]]
        assert len(changed) == 1 and full[changed[0]] == dense[group], f"{unit.name}: not a plain kernel"
        axes[changed[0] - 1] = place
    return {"axes": axes, "sizes": list(full)}


def _correction(unit: Unit, cost: CostModel) -> dict[str, Any]:
    """us = s (factor + ragged_in [c_in ragged] + ragged_out [c_out ragged]) + bytes_us x (1, a, b, a b)
    + ragged_us x (1, a, b, a b) [either ragged]."""
    dense = cost.graph.dense_widths
    surface = cost.surfaces[shape_key(unit.dense)]
    points, rows = [], []
    for share, off in product(product((1.0, 0.75, 0.5, 0.25), repeat=2), ((0, 0), (1, 0), (0, 1), (3, 5))):
        kept = dict(dense)
        for place, group in enumerate(unit.groups):
            near = round(share[place % 2] * dense[group] / 32) * 32 - off[place % 2]
            kept[group] = min(dense[group], max(_least(group, cost), near))
        points.append(kept)
    us = cost.unit_us(unit, points)
    s = surface.at([unit.sizes(kept) for kept in points])
    stairs = surface.stairs.of(surface.kernel.family)
    for kept, tabled in zip(points, s, strict=True):
        _, a, b = unit.sizes(kept)
        off = bool(a % max(stairs.c_in, 8)), bool(b % max(stairs.c_out, 8))
        flat = [1, a, b, a * b]
        rows.append([tabled, tabled * off[0], tabled * off[1], *flat, *(any(off) * term for term in flat)])
    matrix, right = np.array(rows, dtype=np.float64), np.asarray(us)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    fitted = np.linalg.lstsq(matrix / scale, right, rcond=1e-12)[0] / scale
    return {"factors": fitted[:3].tolist(), "bytes_us": fitted[3:7].tolist(), "ragged_us": fitted[7:].tolist()}


def check(document: dict[str, Any], cost: CostModel) -> float:
    rng, worst = np.random.default_rng(0), 0.0
    for unit, plain in zip(cost.units, document["units"], strict=True):
        options = [np.arange(_least(g, cost), cost.graph.dense_widths[g] + 1) for g in unit.groups]
        widths = [rng.choice(own, CHECKED) for own in options]
        points = [dict(zip(unit.groups, map(int, column), strict=True)) for column in zip(*widths, strict=True)] or [{}]
        theirs = cost.unit_us(unit, points)
        ours = unit_us(document, plain, widths)
        worst = max(worst, float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-3))))
    return worst


if __name__ == "__main__":
    main()
