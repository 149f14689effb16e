"""How long `load_bundle` takes with OpenVINO's cache of compiled models and without.

    python -m benchmarks.load_time [--mobilenet mobilenet_v2-*.pth] --out benchmarks/results/load_time_DATE.md

MobileNetV2 at 224x224, fp32, one thread, as `host-openvino` has it. Loads take turns in one process, each with an
OpenVINO of its own: without a cache, with an empty one, and with what the load before left in it. All of them hash the
bundle's files first. About a minute.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torchvision

import edgeprune as ep
from benchmarks.conditions import conditions
from edgeprune.bundle import Contents, write_bundle
from edgeprune.exporting import as_pruned, export
from edgeprune.folders import write_atomically
from edgeprune.measurement import Ratio

ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobilenet", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    if options.mobilenet is not None:
        model.load_state_dict(torch.load(options.mobilenet, weights_only=True))
    x = torch.randn(1, 3, 224, 224)
    device = ep.load_device("host-openvino")
    times: dict[str, list[float]] = {"no cache": [], "an empty cache": [], "a filled cache": []}
    with tempfile.TemporaryDirectory(prefix="edgeprune-load-") as scratch:
        engine = export(as_pruned(model, (x,)), device, Path(scratch, "engine"))
        bundle = write_bundle(Path(scratch, "bundle"), Contents(engine=engine, dense=None)).folder
        for number in range(ROUNDS):
            cache = Path(scratch, f"cache{number}")
            outputs = [timed(times[name], bundle, x.numpy(), None if name == "no cache" else cache) for name in times]
            assert all(np.array_equal(output, outputs[0]) for output in outputs)
        kept = sum(file.stat().st_size for file in cache.iterdir())
        weights = engine.path.with_suffix(".bin").stat().st_size
    lines = [f"# Loading a bundle, {date.today()}", "", *(__doc__ or "").splitlines(), ""]
    lines += [f"{conditions()}. {ROUNDS} rounds, outputs equal bit by bit."]
    lines += [f"The cache holds {kept / 1e6:.1f} MB, model.bin {weights / 1e6:.1f} MB.", ""]
    lines += ["| | median ms | quartiles | over no cache |", "|---|---|---|---|"]
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
        found = Ratio.of([a / b for a, b in zip(seconds, times["no cache"], strict=True)])
        ratio = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
        lines.append(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {ratio} |")
    write_atomically(options.out, "\n".join(lines) + "\n")
    print("\n".join(lines[-3:]))


def timed(seconds: list[float], bundle: Path, x: np.ndarray, cache: Path | None) -> np.ndarray:
    """Adds how long it took to load; gives the output."""
    begun = time.perf_counter()
    with ep.load_bundle(bundle, cache=cache) as net:
        seconds.append(time.perf_counter() - begun)
        return np.asarray(net.run(x))


if __name__ == "__main__":
    main()
