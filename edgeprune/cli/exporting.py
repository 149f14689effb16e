from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import device_of, model_options, modelled_option, precision_option, preprocessing_of

if TYPE_CHECKING:
    import torch

    from edgeprune.pruned import Pruned

EXAMPLE = (
    "Example: edgeprune export torchvision:resnet18 --shape 1x3x224x224 --plan plan.json "
    "--device host-openvino --out build/resnet18"
)


@click.command("export", cls=rich_click.RichCommand, epilog=EXAMPLE)
@model_options
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="plan.json, as `prune` writes it.")
@click.option(
    "--pruned",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder with plan.json and its weights.",
)
@click.option("--device", "device_name", required=True, metavar="NAME", help="An entry of devices.yaml.")
@precision_option
@click.option("--data", metavar="FOLDER|CSV|NPZ|pkg.mod:loader", help="On which int8 finds the ranges of activations.")
@click.option("--preprocess", type=click.Path(path_type=Path), metavar="FILE.json", help="Instead of the model's own.")
@click.option(
    "--store",
    type=click.Choice(["fp32", "fp16", "int8", "sparse"]),
    default="fp32",
    show_default=True,
    help="Of weights.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@modelled_option
@json_option
def command(
    plan_path: Path | None,
    folder: Path | None,
    device_name: str,
    precision: str | None,
    data: str | None,
    preprocess: Path | None,
    store: str,
    out: Path,
    allow_modelled: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Write the engine of a pruned model for a device's runtime, as a bundle that `verify` and `bench` take.

    Nothing is measured yet: the manifest holds no latency.
    """
    if (plan_path is None) == (folder is None):
        raise click.UsageError("give either --plan plan.json or --pruned FOLDER")
    from edgeprune.bundle import Contents, check_target, write_bundle
    from edgeprune.cli.rebuilding import rebuild_lines
    from edgeprune.data import load_data
    from edgeprune.exporting import export, export_dense
    from edgeprune.folders import check_writable
    from edgeprune.models import example_inputs, resolve
    from edgeprune.parity import samples as parity_samples
    from edgeprune.quality import check_runs
    from edgeprune.ranges import batches_of

    device = device_of(device_name, precision=precision, allow_modelled=allow_modelled)
    check_writable(out.resolve().parent)
    check_target(out)
    module = resolve(model["model"], weights=model["weights"], seed=model["seed"])
    examples = example_inputs(model["shape"], model["inputs"], model=module, seed=model["seed"])
    pruned = _pruned(module, examples, plan_path, folder)
    shape = tuple(examples[0].shape)
    preprocessing = preprocessing_of(preprocess, model["model"], shape, weights=model["weights"])
    given = load_data(data, preprocessing, shape, examples[0].dtype) if data else None
    calibration = batches_of(given, examples) if given else ()
    if calibration:
        check_runs(module, *calibration[0])
    named: dict[str, Any] = {"device_name": device_name, "precision": precision, "store": store}
    named |= {"allow_modelled": allow_modelled, "data": data, "preprocess": preprocess}
    with tempfile.TemporaryDirectory(prefix="edgeprune-export-") as scratch:
        engine = export(pruned, device, Path(scratch, "pruned"), weights=store, calibration=calibration)
        contents = Contents(
            engine=engine,
            dense=export_dense(module, examples, device, Path(scratch, "dense"), calibration=calibration),
            model=model["model"],
            preprocessing=preprocessing.model_dump(mode="json") if preprocessing else None,
            command=rebuild_lines({**model, **named}),
            samples=parity_samples(pruned, calibration=engine.calibration) if device.computes else (),
        )
        bundle = write_bundle(out, contents)
    if as_json:
        print_json({"bundle": str(bundle.folder), **bundle.document})
        return
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    click.echo(f"bundle: {bundle.folder} ({len(bundle.manifest.files)} files, {size / 1e6:.1f} MB; not measured yet)")


def _pruned(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...], plan_path: Path | None, folder: Path | None
) -> Pruned:
    from edgeprune.plan_json import Plan
    from edgeprune.surgery import apply
    from edgeprune.weights import load_weights

    if folder is None:
        assert plan_path is not None
        return apply(Plan.from_json(plan_path), module, examples)
    pruned = apply(Plan.from_json(folder / "plan.json"), module, examples)
    load_weights(pruned.module, folder / "weights.safetensors")
    return pruned
