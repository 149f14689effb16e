"""Contract 1 on seven networks: 20 random plans each, parameters re-drawn, with the negative control.

    python benchmarks/exactness.py [--plans 20] [--size 64] [NAME ...]

max |pruned - masked dense| / max |masked dense| in float64; every plan prunes all groups by about a third and drops
about a third of the blocks. The control replaces one kept channel by a removed one and must be far off. Writes
benchmarks/results/exactness_<date>.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgeprune.graph import trace
from edgeprune.surgery import apply
from tests.reference import difference, masked_output, random_plan, redraw, shift_one

NETWORKS = ("mobilenet_v2", "resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "densenet121", "efficientnet_b0")
LIMIT = 1e-9


def check(name: str, plans: int, size: int) -> tuple[str, bool]:
    """A line of the table, and whether all held."""
    started = time.perf_counter()
    model = redraw(torchvision.models.get_model(name, num_classes=50).double(), 0)
    x = (torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)
    graph = trace(model, x)
    errors, controls, dropped = [], [], 0
    for seed in range(plans):
        plan = random_plan(graph, seed)
        dropped += len(plan.dropped)
        reference = masked_output(graph, plan, model, x)
        with torch.no_grad():
            errors.append(difference(apply(plan, model, x, graph=graph).module(*x), reference))
            controls.append(difference(apply(shift_one(plan, graph), model, x, graph=graph).module(*x), reference))
    held = max(errors) <= LIMIT and min(controls) > 1e-6
    spread = float(model(*x).detach().std())
    return (
        f"| {name} | {len(graph.groups)} | {len(graph.blocks)} | {dropped} | {spread:.2f} | {max(errors):.1e} "
        f"| {min(controls):.1e} | {'yes' if held else 'NO'} | {time.perf_counter() - started:.0f} |"
    ), held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NAME")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    lines = [
        f"# Exactness, {date.today()}",
        "",
        f"`python benchmarks/exactness.py`: {arguments.plans} random plans a network, {arguments.size} pixels, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, float64.",
        "",
        "| network | groups | blocks | drops | output std | largest error | least control error | holds | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    ok = True
    for name in arguments.networks:
        line, held = check(name, arguments.plans, arguments.size)
        ok &= held
        lines.append(line)
        print(line, flush=True)
    path = Path(__file__).parent / "results" / f"exactness_{date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
