"""Options that name a model, its inputs, a device and data: the same for every command that takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgeprune.cli.progress import Console
    from edgeprune.device import Device
    from edgeprune.preparing import Task
    from edgeprune.preprocessing import Preprocessing

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(function: Command) -> Command:
    """MODEL, --weights, --shape, --input and --seed."""
    for option in reversed(
        (
            click.argument("model"),
            click.option("--weights", metavar="FILE|DEFAULT", help="A state_dict, or DEFAULT for the download."),
            click.option("--shape", metavar="1x3x224x224", help="One float32 input of this shape."),
            click.option(
                "--input", "inputs", multiple=True, metavar="[NAME=]DTYPE:SHAPE[:RANGE|FILE]", help="Repeatable."
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**32 - 1),
                default=0,
                show_default=True,
                help="Of random weights.",
            ),
        )
    ):
        function = option(function)
    return function


def modelled_option(function: Command) -> Command:
    """--allow-modelled."""
    text = "Take a device whose latencies are modelled from its data sheet, not measured."
    return click.option("--allow-modelled", is_flag=True, help=text)(function)


def lock_option(function: Command) -> Command:
    """--lock-clocks."""
    text = "Hold the device's clocks while it is measured, where that is allowed; they go back whatever happens."
    return click.option("--lock-clocks", is_flag=True, help=text)(function)


def device_of(name: str, *, precision: str | None = None, allow_modelled: bool, lock_clocks: bool = False) -> Device:
    """The device that the options name."""
    from edgeprune.device import in_precision, load_device, with_clocks

    return with_clocks(in_precision(load_device(name, allow_modelled=allow_modelled), precision), held=lock_clocks)


def precision_option(function: Command) -> Command:
    """--precision."""
    text = "Of the arithmetic, one of the device's.  [default: its first]"
    return click.option("--precision", metavar="fp32|fp16|bf16|int8", help=text)(function)


def choice_options(function: Command) -> Command:
    """Those of `prune` and `fit` that say what to choose for and from what."""
    function = lock_option(modelled_option(function))
    for option in reversed(
        (
            click.option("--device", "device_name", required=True, metavar="NAME", help="An entry of devices.yaml."),
            precision_option,
            click.option(
                "--saliency",
                default="taylor_output",
                show_default=True,
                callback=_list_criteria,
                metavar="NAME|help",
                help="How channels and blocks are valued; help lists the criteria.",
            ),
            click.option(
                "--normalise",
                metavar="none|sum|max|mean|euclid|layers|rank",
                help="Values within each group, so that groups compare.  [default: the criterion's own]",
            ),
            click.option("--data", metavar="FOLDER|CSV|NPZ|pkg.mod:loader", help="For saliency, repair and report."),
            click.option(
                "--preprocess", type=click.Path(path_type=Path), metavar="FILE.json", help="Instead of the model's own."
            ),
            click.option("--allow-other-table", is_flag=True, help="Use a table that was measured on another machine."),
            click.option("--wait", is_flag=True, help="Where another process has the table or device, wait for it."),
        )
    ):
        function = option(function)
    return function


def _list_criteria(context: click.Context, option: click.Parameter, value: str) -> str:
    """`--saliency help` ends here, before anything else is asked for."""
    if value == "help":
        from edgeprune.cli.criteria import print_criteria

        print_criteria(as_json=bool(context.params.get("as_json")))
        context.exit(0)
    return value


def make_task(
    model: str,
    *,
    weights: str | None,
    shape: str | None,
    inputs: tuple[str, ...],
    seed: int,
    device_name: str,
    precision: str | None,
    saliency: str,
    normalise: str | None,
    data: str | None,
    preprocess: Path | None,
    allow_other_table: bool,
    wait: bool,
    allow_modelled: bool,
    lock_clocks: bool,
) -> Task:
    """Resolve what the options name; every fault is an `InputError` before anything long starts."""
    from edgeprune.cli.rebuilding import rebuild_lines
    from edgeprune.data import load_data
    from edgeprune.modelled import installed
    from edgeprune.models import example_inputs, resolve
    from edgeprune.preparing import Task
    from edgeprune.saliency.normalising import find_normalisation
    from edgeprune.saliency.registry import find_criterion

    device = device_of(device_name, precision=precision, allow_modelled=allow_modelled, lock_clocks=lock_clocks)
    installed(device, only_to_time=True, engines_in=device.precisions[:1])  # whole networks calibrate the cost model
    find_criterion(saliency)
    if normalise is not None:
        find_normalisation(normalise)
    module = resolve(model, weights=weights, seed=seed)
    examples = example_inputs(shape, inputs, model=module, seed=seed)
    size = tuple(examples[0].shape)
    preprocessing = preprocessing_of(preprocess, model, size, weights=weights)
    return Task(
        model=module,
        name=model,
        example_inputs=examples,
        device=device,
        data=load_data(data, preprocessing, size, examples[0].dtype) if data else None,
        preprocessing=preprocessing,
        saliency=saliency,
        normalise=normalise,
        seed=seed,
        allow_other_table=allow_other_table,
        wait_s=math.inf if wait else 0.0,
        command=rebuild_lines(
            {"model": model, "weights": weights, "shape": shape, "inputs": inputs, "seed": seed, "precision": precision}
            | {"device_name": device_name, "allow_modelled": allow_modelled}
            # an engine in int8 needs data again, for the ranges of its activations
            | ({"data": data, "preprocess": preprocess} if device.precisions[0] == "int8" else {})
        ),
    )


def preprocessing_of(
    file: Path | None, model: str, size: tuple[int, ...], *, weights: str | None
) -> Preprocessing | None:
    """That of `--preprocess`, else the model's own for inputs of this size, where it has one."""
    from edgeprune.preprocessing import Preprocessing, default_preprocessing

    return Preprocessing.from_json(file) if file else default_preprocessing(model, size, weights=weights)


def reporter() -> Console:
    """Lines and a progress bar with an ETA on stderr; only warnings of the log level with -q."""
    from edgeprune.cli.progress import Console

    return Console()
