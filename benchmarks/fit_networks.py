"""Fit six networks to 0.8x and 0.5x on a device and list what was predicted and what was measured.

    python -m benchmarks.fit_networks [--device host-openvino] [NAME ...]

Every fit is a process of its own (`edgeprune fit --json`), its bundle is thrown away. The weights are random (latency
does not depend on them) and no accuracy is claimed; hence `--saliency l2`, which needs no data. Writes
benchmarks/results/fit_<device>_<date>.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions

NETWORKS = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "densenet121", "efficientnet_b0")
BUDGETS = ("0.8x", "0.5x")
HEADER = (
    "| network | budget | exit | met | dense p50 ms | pruned p50 ms | ratio | at most (95 %) | predicted ms | error "
    "| attempts | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def fit(network: str, budget: str, device: str, out: str) -> tuple[int, dict[str, Any], float]:
    """Exit code, document and wall seconds of one fit."""
    command = [
        *(sys.executable, "-m", "edgeprune", "fit", f"torchvision:{network}", "--shape", "1x3x224x224"),
        *("--device", device, "--budget", budget, "--saliency", "l2", "--out", out, "--json"),
    ]
    started = time.perf_counter()
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return run.returncode, json.loads(run.stdout or "{}"), time.perf_counter() - started


def row(network: str, budget: str, code: int, document: dict[str, Any], seconds: float) -> str:
    """One line of the table; a failure shows its message."""
    if "error" in document or not document:
        message = document.get("error", {}).get("message", "")
        return f"| {network} | {budget} | {code} | no | {message} | | | | | | | {seconds:.0f} |"
    dense, pruned = document["dense"], document["pruned"]
    error = document["predicted_ms"] / pruned["p50_ms"] - 1
    return (
        f"| {network} | {budget} | {code} | {'yes' if document['met'] else 'no'} | {dense['p50_ms']:.3f} "
        f"| {pruned['p50_ms']:.3f} | {pruned['ratio']:.3f} | {pruned['ratio_upper']:.3f} "
        f"| {document['predicted_ms']:.3f} | {error:+.1%} | {len(document['attempts'])} | {seconds:.0f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NAME")
    parser.add_argument("--device", default="host-openvino")
    arguments = parser.parse_args()
    lines = [
        f"# Fits on {arguments.device}, {date.today()}",
        "",
        f"`{' '.join(['python -m benchmarks.fit_networks', *sys.argv[1:]])}` on "
        f"{conditions()}. Batch 1, fp32, one thread, 1x3x224x224, random weights.",
        "",
        HEADER,
    ]
    print("\n".join(lines), flush=True)
    missed = 0
    for network in arguments.networks:
        for budget in BUDGETS:
            with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as out:
                code, document, seconds = fit(network, budget, arguments.device, out)
            missed += not document.get("met")
            lines.append(row(network, budget, code, document, seconds))
            print(lines[-1], flush=True)
    lines += ["", f"{len(lines) - 5 - missed} of {len(lines) - 5} within budget."]
    print(lines[-1])
    path = Path(__file__).parent / "results" / f"fit_{arguments.device}_{date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
