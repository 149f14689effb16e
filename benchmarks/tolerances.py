"""How far right engines are from torch in every format, and how far broken ones: what parity's tolerances rest on.

    python -m benchmarks.tolerances --data FOLDER --shared FOLDER [--only NETWORK]... [--device DEVICE]... [--out FILE]

The folders are those of `benchmarks.formats`, and so are the networks, here as they are, not pruned. Each is exported
in every precision and stored form; the error is max|a - b| / max|b| as `edgeprune/parity.py` has it, on 8 inputs that
nothing was fitted to and, in int8, on the four batches of the calibration that parity looks at. A broken engine is one
whose network has the output channels of one layer moved by one place, each layer in turn, computed by torch on two of
the inputs, as many as parity looks at in fp32: a tolerance is of use if it tells these. Half precision is that of
TensorRT's file, as ONNX Runtime computes it on a CPU: in fp32, rounded after each node. Nothing is timed; about 10
minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch

import edgeprune as ep
from benchmarks.conditions import conditions
from benchmarks.formats.networks import NETWORKS, Subject
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError
from edgeprune.exporting import as_pruned, export
from edgeprune.modelled import backend_of
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.parity import CALIBRATED, TOLERANCES, Sample, fed, output_errors, tolerance_of
from edgeprune.ranges import batches_of
from edgeprune.transport import open_session

CHECKED = 8
MOVED = 2  # inputs that a network with a moved layer is tried on
CALIBRATION = 256
DEVICES = ("host-openvino", "host-onnxruntime", "host-tflite")
FORMATS = (("fp32", "fp32"), ("fp32", "fp16"), ("bf16", "fp32"), ("int8", "fp32"))
"""Precision of the arithmetic, how weights are stored."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Errors of one engine: of the inputs that it has not seen, of the calibration's; `fault` where there is none."""

    network: str
    device: str
    precision: str
    weights: str
    tolerance: float = 0.0
    unseen: tuple[float, ...] = ()
    fitted: tuple[float, ...] = ()
    fault: str = ""

    def __str__(self) -> str:
        head = f"| {self.network} | {self.device} | {self.precision} | {self.weights} |"
        if self.fault:
            return f"{head} {self.fault} | | | |"
        fitted = f"{max(self.fitted):.1e}" if self.fitted else ""
        holds = "yes" if max(*self.unseen, *self.fitted) <= self.tolerance else "**no**"
        return f"{head} {median(self.unseen):.1e} | {max(self.unseen):.1e} | {fitted} | {self.tolerance:g} | {holds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=NETWORKS)
    parser.add_argument("--device", action="append", choices=DEVICES, help="all whose runtime is here, unless told")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/tolerances_{date.today()}.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    devices = [ep.load_device(name) for name in options.device or DEVICES]
    devices = [device for device in devices if backend_of(device).available() is None]
    subjects = [NETWORKS[name](options.data, options.shared) for name in options.only or NETWORKS]
    lines = head(subjects)
    for subject in subjects:
        for row in (half(subject), *rows(subject, devices)):
            print(row, flush=True)
            lines.append(str(row))
    lines += ["", "## Broken ones", "", *broken(subjects)]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(subjects: Sequence[Subject]) -> list[str]:
    """What this is and was made with, and the top of the table."""
    return [
        f"# Errors to torch by format, {date.today()}",
        "",
        f"`python -m benchmarks.tolerances`: max abs(a - b) / max abs(b) on {CHECKED} inputs that nothing was fitted",
        f"to, and in int8 on the {CALIBRATED} batches of the calibration that parity looks at. {conditions()}.",
        "",
        *(f"- {subject.name}: {subject.what}" for subject in subjects),
        "",
        "| network | runtime | arithmetic | weights | median | largest | calibration's | tolerance | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def rows(subject: Subject, devices: Sequence[Device]) -> Iterator[Row]:
    """One a device and format."""
    for device in devices:
        for precision, weights in FORMATS:
            if precision in device.precisions:
                yield compared(subject, device, precision, weights)


def half(subject: Subject) -> Row:
    """A file in half precision, its inputs and outputs in fp32."""
    import onnxruntime

    row = Row(network=subject.name, device="TensorRT's file", precision="fp16", weights="fp16")
    try:
        model = to_half(onnx_from_module(subject.model, subject.example))
    except EdgepruneError as error:
        return replace(row, fault=str(error))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    errors = []
    for x in unseen(subject):
        (found,) = session.run(None, {model.graph.input[0].name: x.numpy()})
        with torch.no_grad():
            wanted = subject.model(x).numpy()
        errors.append(float(abs(found - wanted).max() / abs(wanted).max()))
    return replace(row, unseen=tuple(errors), tolerance=TOLERANCES["fp16"])


def unseen(subject: Subject) -> list[torch.Tensor]:
    """Inputs of batch 1 that nothing was fitted to."""
    return [batch for batch, _ in subject.judged.batches(1, limit=CHECKED)]


def compared(subject: Subject, device: Device, precision: str, weights: str) -> Row:
    """Export, load, run."""
    row = Row(network=subject.name, device=device.name, precision=precision, weights=weights)
    calibration = batches_of(subject.fitted, subject.example, most=CALIBRATION) if precision == "int8" else ()
    with tempfile.TemporaryDirectory(prefix="edgeprune-tolerances-") as folder:
        try:
            engine = export(
                as_pruned(subject.model, subject.example),
                device,
                Path(folder, "engine"),
                precision=precision,
                weights=weights,
                calibration=calibration,
            )
            fitted = [batch[0] for batch in calibration[:CALIBRATED]]
            errors = of_engine(engine, device, subject, [*unseen(subject), *fitted])
        except EdgepruneError as error:
            return replace(row, fault=str(error).splitlines()[0])
    first, rest = tuple(errors[:CHECKED]), tuple(errors[CHECKED:])
    return replace(row, unseen=first, fitted=rest, tolerance=tolerance_of(engine))


def of_engine(engine: Engine, device: Device, subject: Subject, inputs: Sequence[torch.Tensor]) -> list[float]:
    """The error of each input."""
    errors = []
    with open_session(device, precision=engine.precision) as session, torch.no_grad():
        session.load("engine", engine.path)
        for x in inputs:
            sample = Sample(inputs=(x.numpy(),), outputs=(subject.model(x).numpy(),))
            found = session.run("engine", fed(engine, sample))
            errors.append(max(output_errors(engine, found, sample).values()))
    return errors


def broken(subjects: Sequence[Subject]) -> Iterator[str]:
    """How many networks with one moved layer each tolerance tells."""
    yield f"Output channels of one layer moved by one place, each layer in turn; the largest error over {MOVED} inputs."
    yield ""
    names = [f"told at {name}, {tolerance:g}" for name, tolerance in TOLERANCES.items()]
    yield f"| network | layers | least | median | {' | '.join(names)} |"
    yield f"|---|---|---|---|{'---|' * len(names)}"
    for subject in subjects:
        errors = sorted(error for _, error in moved(subject))
        told = [sum(error > tolerance for error in errors) for tolerance in TOLERANCES.values()]
        line = f"| {subject.name} | {len(errors)} | {errors[0]:.1e} | {median(errors):.1e} |"
        line = f"{line} {' | '.join(map(str, told))} |"
        print(line, flush=True)
        yield line


def moved(subject: Subject) -> Iterator[tuple[str, float]]:
    """Each layer and the error that moving its output channels makes."""
    x = torch.cat(unseen(subject)[:MOVED])
    with torch.no_grad():
        b = subject.model(x)
        largest = b.abs().amax(1)
        for name, layer in subject.model.named_modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                parameters = [layer.weight, *([] if layer.bias is None else [layer.bias])]
                for parameter in parameters:
                    parameter.copy_(parameter.roll(1, 0))
                error = float(((subject.model(x) - b).abs().amax(1) / largest).max())
                for parameter in parameters:
                    parameter.copy_(parameter.roll(-1, 0))
                yield name, error


if __name__ == "__main__":
    main()
