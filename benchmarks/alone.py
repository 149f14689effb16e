"""Does a kernel alone take as long as its unit in a network?

    python -m benchmarks.alone [--device host-openvino] [--table FILE] [--only NETWORK]...

Over the whole networks of a latency table: for each operator with what is fused into it the sum of what its units
take by their surfaces, and over it the sum of the times that the runtime told of them in the networks. The ratio is 1
where a kernel alone is what runs in a network; cold weights and inputs make it more. What is far from 1 and no matter
of the cache is timed in another way than it runs: in another layout, say, or without what is fused into it.
Needs no device. Writes benchmarks/results/alone_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np

import edgeprune as ep
from benchmarks.clocks import known_tables
from benchmarks.prediction.networks import NETWORKS, build
from edgeprune.cost import cost_model, is_covered, works_at
from edgeprune.errors import TableError
from edgeprune.fingerprint import describe
from edgeprune.graph import trace
from edgeprune.table import LatencyTable, read_table

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--table", type=Path, metavar="FILE", help="instead of the one that is known for the device")
    parser.add_argument("--only", action="append", default=[], metavar="NETWORK", choices=NETWORKS)
    options = parser.parse_args()
    paths = [options.table] if options.table else known_tables(ep.load_device(options.device))
    table = read_table(paths, allow_other=True)
    parts = [f"# Kernels alone and in networks, {options.device}, {date.today()}", ""]
    parts += [f"`python -m benchmarks.alone --device {options.device}`: a table of {describe(table.facts)}.", ""]
    parts += ["| network | kernel | units | alone, ms | in networks, over alone: all | middle half of them |"]
    parts += ["|---|---|---|---|---|---|"]
    for name in options.only or NETWORKS:
        lines = list(lines_of(name, table))
        print("\n".join(lines), flush=True)
        parts += lines
    path = RESULTS / f"alone_{options.device}_{date.today()}.md"
    path.write_text("\n".join([*parts, ""]), encoding="utf-8")
    print(path)
    return 0


def lines_of(name: str, table: LatencyTable) -> Iterable[str]:
    """Lines of one network, the kernels of most time first.

    Left out are networks without node times, and those with kernels that lie on no surface: of a table of before, whose
    units are fused in another way.
    """
    model, inputs = build(name)
    graph = trace(model, inputs)
    try:
        surfaces = cost_model(graph, table).surfaces
    except TableError as error:
        yield f"| {name} | {error} | | | | |"
        return
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    networks = [network for network in table.networks if network.structure == graph.structure_hash]
    compared = [network for network in networks if network.nodes and is_covered(network, surfaces)]
    if len(compared) < len(networks):
        yield f"| {name} | {len(networks) - len(compared)} of {len(networks)} networks left out | | | | |"
    for network in compared:
        reference = table.references_us[network.reference]
        told = {unit: ratio * reference for unit, ratio in network.nodes.items()}
        for work in works_at(network.kernels, surfaces, told):
            if work.node_us is not None:
                kind = " +".join([work.kernel.family, *work.kernel.epilogue])
                times[kind].append((work.us, work.node_us))
    for kind, pairs in sorted(times.items(), key=lambda item: -sum(us for us, _ in item[1])):
        alone, inside = np.array(pairs).T
        low, high = np.quantile(inside / alone, [0.25, 0.75])
        yield (
            f"| {name} | {kind} | {len(pairs)} | {alone.sum() / 1e3:.2f} | {inside.sum() / alone.sum():.2f} "
            f"| {low:.2f} to {high:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
