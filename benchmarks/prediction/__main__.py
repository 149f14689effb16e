"""How well does the cost model predict networks that it has not seen?

    python -m benchmarks.prediction [--device host-openvino] [--only NETWORK]... [--work FOLDER] [--again STAGE]...
        [--seeds FIRST]

For each network, one after the other on one table that starts empty: profile (`kernels`), make engines (`convert`, the
one stage that another core may do), calibrate on whole networks (`profile`), predict 12 random choices of widths (every
group uniform in 0.25 to 1.0 of its channels; even ones anywhere, odd ones on multiples of 8; their seeds count from
FIRST) and what the solver chooses for 0.8x, 0.6x, 0.5x and 0.4x (`predict`, `--saliency l2`), then
measure these and the dense network twice, in two processes, interleaved (`measure`), as a fit would. Nothing predicted
is used to calibrate. *Table only* is the prediction without the networks of the same structure, from the table of all
others (`table_only`, at the end). Resumable: what is done for a network is kept in FOLDER, with the seeds that it was
done with. Writes
benchmarks/results/prediction_<device>_<date>.{jsonl,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.prediction.networks import FIRST_SEED, NETWORKS
from benchmarks.prediction.report import write

RESULTS = Path(__file__).parent.parent / "results"
STAGES = ("kernels", "convert", "profile", "predict", "measure", "table_only")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prediction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="host-openvino")
    parser.add_argument("--only", action="append", default=[], metavar="NETWORK", choices=NETWORKS)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="table, engines and what was found so far")
    parser.add_argument("--stage", action="append", default=[], choices=STAGES, help="do only this, of all networks")
    parser.add_argument("--again", action="append", default=[], choices=STAGES, help="do this stage again")
    parser.add_argument("--seeds", type=int, default=FIRST_SEED, metavar="FIRST", help="of the random widths")
    options = parser.parse_args()
    work = options.work or Path(tempfile.gettempdir()) / "edgeprune-prediction"
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # a table of its own, which starts empty
    os.environ["EDGEPRUNE_SHIPPED_TABLES"] = str(work / "none")
    from benchmarks.prediction import stages

    names = options.only or list(NETWORKS)
    rows: dict[str, dict[str, Any]] = {}
    wanted = options.stage or STAGES
    steps = [(name, stage) for name in names for stage in wanted if stage != "table_only"]
    steps += [(name, "table_only") for name in names if "table_only" in wanted]
    for name, stage in steps:
        path = work / options.device / f"{name}.json"
        row = json.loads(path.read_text("utf-8")) if path.is_file() else {"network": name, "device": options.device}
        if stage not in row or stage in options.again:
            started = time.perf_counter()
            if stage in ("convert", "predict"):
                row["first_seed"] = options.seeds
            row[stage] = getattr(stages, stage)(name, options.device, work, row)
            row[stage]["seconds"] = round(time.perf_counter() - started, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row), encoding="utf-8")
            print(f"{name:24} {stage:10} {row[stage]['seconds']:6.1f} s  {row[stage].get('told', '')}", flush=True)
        rows[name] = row
    if all("table_only" in row for row in rows.values()):
        print(write(list(rows.values()), RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
