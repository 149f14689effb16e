"""Zeros anywhere in the weights, on this CPU: which runtime multiplies less for them, and from which share on.

    python -m benchmarks.unstructured --out benchmarks/results/unstructured_DATE.md [--mobilenet mobilenet_v2-*.pth]
        [--only linears|litert|openvino|emulated]... [--emulated PYTHON] [--quick]

linears   LiteRT: one linear of several sizes, on one row and on several; dense, with zeros stored densely, and with
          sparse rows (`edgeprune export --store sparse`).
litert    LiteRT: AlexNet and MobileNetV2, also with the sparse tensors behind DENSIFY from which XNNPACK takes that it
          may look for sparse kernels.
openvino  fp32 and int8, without and with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, which is documented for AMX.
emulated  LiteRT's listing of a small network under another Python, one whose CPU has no AVX: a script such as
          `exec qemu-x86_64 -cpu Nehalem .venv/bin/python "$@"`. Times mean nothing there; kernels and outputs do.

Engines of one table run in one process, in hot bursts that take turns with two reference kernels, then in a second one
that loads them the other way round; a ratio is the median of the rounds' ratios, with its 95 % interval and the rounds'
robust deviation. *Error*: max|a - b| / max|b| to the same zeros stored densely. About 10 minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeprune as ep
from benchmarks.conditions import conditions
from benchmarks.unstructured_files import (
    LITERT_FORMS,
    chain,
    converted,
    densified,
    linear,
    networks,
    openvino_file,
    openvino_zeros,
    stored_sparse,
    with_zeros,
)
from edgeprune.backends import find_backend
from edgeprune.device_program import assemble
from edgeprune.errors import InputError
from edgeprune.folders import write_atomically
from edgeprune.local_channel import LocalChannel
from edgeprune.measurement import Loaded, Measurement, NodeTimes, Timing, joined
from edgeprune.references import load_references
from edgeprune.transport import Session

SHARES = (0.5, 0.67, 0.8, 0.9, 0.95)
LINEARS = ((1, 256, 256), (1, 1024, 1024), (1, 4096, 4096), (4, 1024, 1024), (32, 384, 1536))
ROWS_SHARES = (0.8, 0.9, 0.95, 0.98)
TIMING = Timing(min_rounds=12, max_rounds=16, max_seconds=120.0)
RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
DENSE = "dense"
MULTIPLYING = ("Conv", "Fully Connected", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobilenet", type=Path)
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--emulated", metavar="PYTHON")
    parser.add_argument("--quick", action="store_true", help="two shares and few rounds: for trying it out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"# Zeros anywhere, {date.today()}",
        "",
        *(__doc__ or "").splitlines(),
        "",
        f"{conditions()}. One thread.",
        "",
    ]
    for name in options.only or SECTIONS:
        for line in SECTIONS[name](options):
            print(line, flush=True)
            lines.append(line)
        lines.append("")
        write_atomically(options.out, "\n".join(lines).rstrip() + "\n")


def linears(options: argparse.Namespace) -> Iterator[str]:
    """One linear: dense, zeros stored densely, sparse rows."""
    yield "## LiteRT, one linear"
    yield ""
    yield "Time over that of the dense file: with sparse rows at these zeros, and with 95 % zeros stored densely."
    yield ""
    shares = _shares(options, ROWS_SHARES)
    yield f"| rows x in x out | dense us | {' | '.join(f'{share:.0%}' for share in shares)} | 95%, dense | error |"
    yield f"|{'---|' * (len(shares) + 4)}"
    for rows, c_in, c_out in LINEARS:
        dense = linear(rows, c_in, c_out)
        files = {f"sparse {share}": stored_sparse(with_zeros(dense, share), most_rows=rows) for share in shares}
        found = side_by_side("tflite", {DENSE: dense, "zeros 0.95": with_zeros(dense, 0.95), **files}, options)
        cells = [found.ratio(key) for key in (*files, "zeros 0.95")]
        error = found.error("sparse 0.95", "zeros 0.95")
        yield f"| {rows}x{c_in}x{c_out} | {found.us(DENSE):.4g} | {' | '.join(cells)} | {error:.1e} |"


def litert(options: argparse.Namespace) -> Iterator[str]:
    """Whole networks."""
    yield "## LiteRT, whole networks"
    yield ""
    yield "Zeros in every linear and every 1x1 convolution. *Listing*: the kernels that LiteRT's profile names."
    yield ""
    yield "| network | zeros | form | MB | ms | over dense | error | listing |"
    yield "|---|---|---|---|---|---|---|---|"
    known = networks(options.mobilenet)
    for name in ("AlexNet", "MobileNetV2"):
        shares = _shares(options, ROWS_SHARES[1:] if name == "AlexNet" else SHARES)
        with tempfile.TemporaryDirectory(prefix="edgeprune-unstructured-") as folder:
            dense = converted(*known[name], Path(folder, "out"))
        rows: dict[str, tuple[float, str]] = {DENSE: (0.0, DENSE)}
        files: dict[str, bytes] = {DENSE: dense}
        for share in shares:
            zeros = with_zeros(dense, share)
            for form, store in LITERT_FORMS.items():
                if share != 0.95 and store is not (stored_sparse if name == "AlexNet" else densified):
                    continue  # the others are the same at any share
                rows[f"{form} {share}"], files[f"{form} {share}"] = (share, form), store(zeros)
        yield from _lines(name, rows, files, options)


def _lines(
    name: str, rows: Mapping[str, tuple[float, str]], files: Mapping[str, bytes | Path], options: argparse.Namespace
) -> Iterator[str]:
    plain = next(iter(LITERT_FORMS))
    found = side_by_side("tflite", files, options)
    for key, (share, form) in rows.items():
        base = f"{plain} {share}"
        error = "" if key in (DENSE, base) or base not in files else f"{found.error(key, base):.1e}"
        file = files[key]
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        cells = [name, f"{share:.0%}", form, f"{size / 1e6:.1f}", f"{found.us(key) / 1e3:.3f}"]
        cells += ["" if key == DENSE else found.ratio(key), error, found.listing(key)]
        yield f"| {' | '.join(cells)} |"


def openvino(options: argparse.Namespace) -> Iterator[str]:
    """Networks with zeros beside the same without, the property off and on."""
    import openvino as ov

    core = ov.Core()
    known = networks(options.mobilenet)
    yield "## OpenVINO"
    yield ""
    capabilities = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    yield f"`{RATE}` is {core.get_property('CPU', RATE)} unless set (1: never). This CPU computes in {capabilities}."
    yield "*Kernels*: `primitiveType` of linears and convolutions in `get_runtime_model()`; a sparse one would have"
    yield "`sparse` in its name."
    yield ""
    yield "| network | precision | property | dense ms | zeros: time over dense | kernels at the most zeros |"
    yield "|---|---|---|---|---|---|"
    for name, precision in (("feed-forward", "int8"), ("MobileNetV2", "fp32")):
        shares = _shares(options, SHARES)
        with tempfile.TemporaryDirectory(prefix="edgeprune-unstructured-") as folder:
            dense = openvino_file(*known[name], precision, Path(folder, DENSE))
            zeros = {f"zeros {share}": openvino_zeros(dense, share, Path(folder, str(share))) for share in shares}
            files: dict[str, bytes | Path] = {DENSE: dense, **zeros}
            for rate in (None, "0.4"):
                kernels = _kernels(core, files[f"zeros {shares[-1]}"], rate)
                found = side_by_side("openvino", files, options, precision=precision, rate=rate)
                told = "; ".join(f"{share:.0%}: {found.ratio(f'zeros {share}')}" for share in shares)
                cells = [name, precision, rate or "unset", f"{found.us(DENSE) / 1e3:.3f}", told, kernels]
                yield f"| {' | '.join(cells)} |"


def _kernels(core: Any, path: Any, rate: str | None) -> str:
    """What OpenVINO says that it runs."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", **({RATE: rate} if rate else {})}
    nodes = core.compile_model(str(path), "CPU", config).get_runtime_model().get_ops()
    told = [{key: str(node.rt_info[key].value) for key in ("layerType", "primitiveType")} for node in nodes]
    wanted = ("FullyConnected", "Convolution", "MatMul")
    found = Counter(f"{n['layerType']} {n['primitiveType']}" for n in told if n["layerType"] in wanted)
    return ", ".join(f"{count} {kernel}" for kernel, count in found.items())


def emulated(options: argparse.Namespace) -> Iterator[str]:
    """The same file here and on a CPU without AVX: which kernels run, and whether the outputs agree."""
    yield "## LiteRT on a CPU without AVX, emulated"
    yield ""
    if options.emulated is None:
        yield "Not asked for (`--emulated PYTHON`)."
        return
    dense = with_zeros(chain(), 0.8)
    yield "A small network of MobileNetV2's parts, 80 % zeros; *error*: of the outputs to those of the dense file here."
    yield ""
    yield "| CPU | file | error | listing |"
    yield "|---|---|---|---|"
    files: dict[str, bytes | Path] = {DENSE: dense, "sparse": densified(dense)}
    quick = argparse.Namespace(quick=True)
    wanted: Array | None = None
    for place, python in (("this one", sys.executable), ("emulated, without AVX", options.emulated)):
        found = side_by_side("tflite", files, quick, python=python)
        wanted = found.outputs[DENSE] if wanted is None else wanted
        for key in files:
            yield f"| {place} | {key} | {_error(found.outputs[key], wanted):.1e} | {found.listing(key)} |"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What engines of one runtime gave side by side, by key."""

    measured: Measurement
    outputs: Mapping[str, Array]
    listings: Mapping[str, NodeTimes | None]

    def us(self, key: str) -> float:
        """Median in microseconds."""
        return self.measured.percentile_us(key)

    def ratio(self, key: str) -> str:
        """Median of the rounds' ratios to dense, 95 % interval, robust deviation of a round."""
        found = self.measured.ratio(key, DENSE, without=self.measured.disturbed())
        return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] ±{found.spread:.1%}"

    def error(self, key: str, base: str) -> float:
        """max|a - b| / max|b| of the outputs on one input."""
        return _error(self.outputs[key], self.outputs[base])

    def listing(self, key: str) -> str:
        """How often each kernel runs, of those that multiply by weights."""
        listed = self.listings.get(key)
        tags = [str(node["type"]) for node in listed.nodes] if listed else []
        counts = Counter(tag for tag in tags if tag.startswith(MULTIPLYING))
        return ", ".join(f"{count} {tag}" for tag, count in counts.items()) or "none"


def side_by_side(
    backend: str,
    files: Mapping[str, bytes | Path],
    options: argparse.Namespace,
    *,
    precision: str = "fp32",
    rate: str | None = None,
    python: str = sys.executable,
) -> Found:
    """One run of every engine on the same input, then all timed in two processes; `rate` is the property's value."""
    device = ep.load_device(f"host-{backend}")
    timing = replace(TIMING, min_rounds=4, max_rounds=4, warmup_ms=10) if options.quick else TIMING
    told = {"threads": 1, "precision": precision, "streams": 1, "hint": "latency", "affinity": None}
    outputs: dict[str, Array] = {}
    listings: dict[str, NodeTimes | None] = {}
    parts = []
    with tempfile.TemporaryDirectory(prefix="edgeprune-unstructured-") as scratch:
        folder = Path(scratch)
        paths = {key: _path(file, folder / f"{i}.tflite") for i, (key, file) in enumerate(files.items())}
        program = assemble({backend: _runner(backend, rate, folder / "runner.py")})
        for seed, order in enumerate(([*paths], [*paths][::-1])):
            with LocalChannel(program.text, backend, python=python) as channel:
                session = Session(channel, told, silence_s=600.0)
                loaded = {key: session.load(key, paths[key]) for key in order}
                outputs = {key: session.run(key, [_drawn(found)])[0] for key, found in loaded.items()}
                references = load_references(session, device, precision, folder)
                anchors = dict.fromkeys(paths, DENSE) | {DENSE: references[0]}
                share = timing.shared_by(2)
                parts.append(session.measure([*paths], references, timing=share, anchors=anchors, seed=seed))
                if seed and backend == "tflite":
                    listings = {key: _listed(session, key, path) for key, path in paths.items()}
    return Found(measured=joined(parts), outputs=outputs, listings=listings)


def _path(file: bytes | Path, target: Path) -> Path:
    if isinstance(file, Path):
        return file
    target.write_bytes(file)
    return target


def _runner(backend: str, rate: str | None, target: Path) -> Path:
    """The backend's own; with the property for all that its process compiles, where one is given."""
    runner = find_backend(backend).runner_path()
    if rate is None:
        return runner
    target.write_text(f'{runner.read_text()}\n_core.set_property("CPU", {{"{RATE}": "{rate}"}})\n', "utf-8")
    return target


def _listed(session: Session, key: str, path: Path) -> NodeTimes | None:
    """Of a second instance, which profiles."""
    session.unload(key)
    session.load(key, path, profile=True)
    session.measure([key], timing=Timing(warmup_ms=1, burst_ms=1, min_rounds=1, max_rounds=1))
    return session.node_times(key)


def _drawn(loaded: Loaded) -> Array:
    return np.random.default_rng(0).standard_normal(loaded.inputs[0].shape, dtype=np.float32)


def _error(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def _shares(options: argparse.Namespace, shares: tuple[float, ...]) -> tuple[float, ...]:
    return shares[-2:] if options.quick else shares


SECTIONS = {"linears": linears, "litert": litert, "openvino": openvino, "emulated": emulated}
"""In the order of the report."""


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
