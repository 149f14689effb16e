from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import model_options
from edgeprune.errors import InputError, RefusedError

if TYPE_CHECKING:
    from edgeprune.graph import Block, Group, ModelGraph, Refusal

PLACES = 3
"""How many places of one reason are shown without -v."""


@click.command(
    "inspect",
    cls=rich_click.RichCommand,
    epilog="Example: edgeprune inspect torchvision:resnet18 --shape 1x3x224x224",
)
@model_options
@click.option("--sparsity", is_flag=True, help="MODEL is FILE.onnx or a bundle: which layers are 2:4, and may be.")
@json_option
def command(
    model: str,
    weights: str | None,
    shape: str | None,
    inputs: tuple[str, ...],
    seed: int,
    sparsity: bool,
    as_json: bool,
) -> None:
    """Show what can be pruned in a model, and what can't and why.

    A *group* is channels that shrink together, a *block* a residual branch that may be dropped. *indices* is how many
    indices one channel takes in the dimension that names its group (a head is head_dim wide). The share counts
    convolutions and linears with at least one dimension that can shrink. -v shows every place of a refusal.
    """
    if sparsity:
        if weights is not None or shape is not None or inputs:
            raise InputError("--sparsity reads a file as it is: leave out --weights, --shape and --input")
        _print_sparsity(model, as_json)
        return
    from edgeprune.graph import analyse, check_prunable, tracing
    from edgeprune.models import example_inputs, resolve

    module = resolve(model, weights=weights, seed=seed)
    examples = example_inputs(shape, inputs, model=module, seed=seed)
    started = time.perf_counter()
    program = tracing.trace_program(module, examples)
    traced = time.perf_counter()
    graph = analyse(program)
    seconds = {"trace": traced - started, "analysis": time.perf_counter() - traced}
    every = logging.getLogger("edgeprune").isEnabledFor(logging.DEBUG)
    try:
        check_prunable(graph)
    except RefusedError as error:
        if as_json or every:
            raise
        raise RefusedError(*error.args, reasons=_reasons(graph.refused, every=False)) from None
    if as_json:
        print_json(_document(model, graph, seconds))
    else:
        _print(model, graph, seconds, every=every)


def _print_sparsity(file: str, as_json: bool) -> None:
    from pathlib import Path

    from edgeprune.sparsity.onnx_weights import counts, layers_of_file

    layers = layers_of_file(Path(file))
    found = counts(layers)
    if as_json:
        print_json({"file": file, **found, "of": [layer.to_json() for layer in layers]})
        return
    click.echo(
        f"{file}: {found['layers']} layers with constant weights, {found['sparse']} of them 2:4, of which sparse "
        f"tensor cores may take {found['eligible']}; whether they do, the runtime's log tells"
    )
    click.echo("\npattern  zeros  precision  shape               layer")
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        note = f"  ({layer.refused})" if layer.refused else "  (small: dense is mostly faster)" if layer.small else ""
        click.echo(f"{layer.pattern:>7}  {layer.zeros:>5.0%}  {layer.precision:>9}  {shape:<18}  {layer.name}{note}")


def _document(model: str, graph: ModelGraph, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "model": model,
        "groups": [_group(group, graph.blocks) for group in graph.groups],
        "blocks": [_block(block) for block in graph.blocks],
        "refused": [vars(refusal) for refusal in graph.refused],
        "prunable_macs_share": round(graph.prunable_macs_share, 6),
        "prunable_params_share": round(graph.prunable_params_share, 6),
        "structure_hash": graph.structure_hash,
        "tracer": graph.program.tracer,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _group(group: Group, blocks: Iterable[Block]) -> dict[str, Any]:
    return {
        "id": group.id,
        "num_channels": group.num_channels,
        "granularity": granularity(group),
        "least_channels": group.least_channels,
        "changes_statistics": group.changes_statistics,
        "blocks": [block.id for block in blocks if group.id in block.inside],
        "members": [{"parameter": m.parameter, "dim": m.dim, "role": m.role} for m in group.members],
    }


def granularity(group: Group) -> int:
    """Indices that one channel takes in the dimension that names the group, at full width; the most of any channel."""
    import numpy as np

    channels = group.first.channels
    return int(np.bincount(channels[channels >= 0]).max())


def _block(block: Block) -> dict[str, Any]:
    return {
        "id": block.id,
        "ends_in": " + ".join(block.zero_modules),
        "inside": list(block.inside),
        "within": block.within,
    }


def _print(model: str, graph: ModelGraph, seconds: dict[str, float], *, every: bool) -> None:
    tracer = "" if graph.program.tracer == "recording" else f" by {graph.program.tracer}"
    click.echo(
        f"{model}: {len(graph.groups)} groups, {len(graph.blocks)} blocks droppable, {len(graph.refused)} refused; "
        f"{graph.prunable_macs_share:.1%} of MACs and {graph.prunable_params_share:.1%} of parameters in layers that "
        f"can shrink (trace{tracer} {seconds['trace']:.1f} s, analysis {seconds['analysis']:.1f} s)"
    )
    if graph.groups:
        click.echo("\nchannels  indices  tensors  group")
    for group in graph.groups:
        marks = ["changes statistics"] if group.changes_statistics else []
        marks += [f"in block {block.id or '(the model itself)'}" for block in graph.blocks if group.id in block.inside]
        mark = f"  ({', '.join(marks)})" if marks else ""
        click.echo(f"{group.num_channels:>8}  {granularity(group):>7}  {len(group.members):>7}  {group.id}{mark}")
    if graph.blocks:
        click.echo("\nblock  (what is dropped ends in; groups inside; block around it)")
    for block in graph.blocks:
        ends_in, around = " + ".join(block.zero_modules), "" if block.within is None else f"; {block.within}"
        click.echo(f"{block.id or '(the model itself)'}  ({ends_in}; {len(block.inside)}{around})")
    if graph.refused:
        click.echo("\nplaces  refused")
    for line in _reasons(graph.refused, every=every):
        click.echo(line)


def _reasons(refused: Iterable[Refusal], *, every: bool) -> Iterator[str]:
    """Each operator and reason once, with the number of places and the first ones."""
    from edgeprune.graph.structure import by_reason

    for (operator, reason), names in by_reason(refused).items():
        more = 0 if every else len(names) - PLACES
        shown = ", ".join(names if more <= 0 else names[:PLACES])
        yield f"{len(names):>6}  {operator}: {reason}"
        yield f"        at {shown}" + (f" and {more} more (-v shows them)" if more > 0 else "")
