from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.cli.task import model_options

if TYPE_CHECKING:
    from edgeprune.graph import Block, Group, ModelGraph


@click.command(
    "inspect",
    cls=rich_click.RichCommand,
    epilog="Example: edgeprune inspect torchvision:resnet18 --shape 1x3x224x224",
)
@model_options
@json_option
def command(
    model: str, weights: str | None, shape: str | None, inputs: tuple[str, ...], seed: int, as_json: bool
) -> None:
    """Show what can be pruned in a model, and what can't and why.

    A *group* is channels that shrink together, a *block* a residual branch that may be dropped. The share counts
    convolutions and linears with at least one dimension that can shrink.
    """
    from edgeprune.graph import analyse, check_prunable, tracing
    from edgeprune.models import example_inputs, resolve

    module = resolve(model, weights=weights, seed=seed)
    examples = example_inputs(shape, inputs, model=module, seed=seed)
    started = time.perf_counter()
    program = tracing.trace_program(module, examples)
    traced = time.perf_counter()
    graph = analyse(program)
    seconds = {"trace": traced - started, "analysis": time.perf_counter() - traced}
    check_prunable(graph)
    if as_json:
        print_json(_document(model, graph, seconds))
    else:
        _print(model, graph, seconds)


def _document(model: str, graph: ModelGraph, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "model": model,
        "groups": [_group(group) for group in graph.groups],
        "blocks": [_block(block) for block in graph.blocks],
        "refused": [vars(refusal) for refusal in graph.refused],
        "prunable_macs_share": round(graph.prunable_macs_share, 6),
        "prunable_params_share": round(graph.prunable_params_share, 6),
        "structure_hash": graph.structure_hash,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "id": group.id,
        "num_channels": group.num_channels,
        "least_channels": group.least_channels,
        "changes_statistics": group.changes_statistics,
        "members": [{"parameter": m.parameter, "dim": m.dim, "role": m.role} for m in group.members],
    }


def _block(block: Block) -> dict[str, Any]:
    return {
        "id": block.id,
        "ends_in": " + ".join(block.zero_modules),
        "inside": list(block.inside),
        "within": block.within,
    }


def _print(model: str, graph: ModelGraph, seconds: dict[str, float]) -> None:
    click.echo(
        f"{model}: {len(graph.groups)} groups, {len(graph.blocks)} blocks droppable, {len(graph.refused)} refused; "
        f"{graph.prunable_macs_share:.1%} of MACs and {graph.prunable_params_share:.1%} of parameters in layers that "
        f"can shrink (trace {seconds['trace']:.1f} s, analysis {seconds['analysis']:.1f} s)"
    )
    if graph.groups:
        click.echo("\nchannels  tensors  group")
    for group in graph.groups:
        mark = "  (changes statistics)" if group.changes_statistics else ""
        click.echo(f"{group.num_channels:>8}  {len(group.members):>7}  {group.id}{mark}")
    if graph.blocks:
        click.echo("\nblock  (what is dropped ends in; groups inside; block around it)")
    for block in graph.blocks:
        ends_in, around = " + ".join(block.zero_modules), "" if block.within is None else f"; {block.within}"
        click.echo(f"{block.id or '(the model itself)'}  ({ends_in}; {len(block.inside)}{around})")
    if graph.refused:
        click.echo("\nrefused")
    for refusal in graph.refused:
        click.echo(f"{refusal.where or '(the model itself)'}: {refusal.operator}: {refusal.reason}")
