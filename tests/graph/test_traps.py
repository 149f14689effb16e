"""Networks made to go wrong: groups as worked out by hand, refusals by operator, and exactness with its control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from edgeprune.errors import RefusedError
from edgeprune.graph import ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply
from tests.graph.traps import TRAPS, Trap
from tests.reference import difference, masked_outputs, outputs_of, random_plan, redraw, shift_one

pytestmark = pytest.mark.unit

REFUSED = {name: trap for name, trap in TRAPS.items() if not trap.groups}
PRUNABLE = {name: trap for name, trap in TRAPS.items() if trap.groups}


def each(traps: dict[str, Trap]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trap", traps.values(), ids=traps.keys())


def sizes(graph: ModelGraph, dimension: str) -> tuple[int, ...]:
    """Numbers of channels of the groups that a dimension ("conv.weight:0") belongs to."""
    belongs = [g for g in graph.groups if any(f"{m.parameter}:{m.dim}" == dimension for m in g.members)]
    return tuple(sorted(group.num_channels for group in belongs))


def doubled(trap: Trap, seed: int) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """The model and its inputs in float64, every weight drawn anew."""
    model = redraw(trap.build().double(), seed)
    return model, tuple(x.double() if x.is_floating_point() else x for x in trap.inputs)


def distance(got: Any, expected: Any) -> float:
    """The largest difference over all outputs that the reference gives."""
    return max(difference(a, b) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True))


@each(TRAPS)
def test_the_network_runs(trap: Trap) -> None:
    model, x = doubled(trap, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        outputs = tree_leaves(model(*(tensor.clone() for tensor in x)))
    assert all(out.isfinite().all() and out.std() > 1e-3 for out in outputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {key.rpartition(":")[0] for key in trap.groups} <= names, "the answer names what the model has"


@each(PRUNABLE)
def test_groups_are_those_worked_out_by_hand(trap: Trap) -> None:
    graph = trace(trap.build(), trap.inputs)
    found = {dimension: sizes(graph, dimension) for dimension in trap.groups}
    wrong = {
        dimension: f"{' or '.join(map(str, trap.groups[dimension]))}, found {got}"
        for dimension, got in found.items()
        if got not in trap.groups[dimension]
    }
    assert not wrong, "\n".join(f"{r.operator} at {r.where or 'the model'}: {r.reason}" for r in graph.refused)
    if trap.refused is not None:
        assert any(trap.refused in refusal.operator for refusal in graph.refused), graph.refused


@each(REFUSED)
def test_the_whole_model_is_refused(trap: Trap) -> None:
    with pytest.raises(RefusedError) as caught:
        trace(trap.build(), trap.inputs)
    assert trap.refused is not None
    assert trap.refused in f"{caught.value} {caught.value.reasons}"


@each(PRUNABLE)
def test_pruning_is_exact(trap: Trap) -> None:
    moved = []
    for seed in range(3):
        model, x = doubled(trap, seed)
        graph = trace(model, x)
        plan = random_plan(graph, seed, drop=0.5 if seed else 0.0)
        expected = masked_outputs(graph, plan, model, copies(x))
        assert distance(output(plan, graph, model, x), expected) <= 1e-9, plan
        hidden = {group for block in graph.blocks if block.id in plan.dropped for group in block.inside}
        if any(len(plan.kept[g.id]) < (g.first.channels >= 0).sum() for g in graph.groups if g.id not in hidden):
            moved.append(distance(output(shift_one(plan, graph), graph, model, x), expected))
    assert moved, "no plan removed anything that a dropped block leaves"
    assert max(moved) > 1e-9, "the negative control passed: with another channel kept the output is the same"


def output(plan: Plan, graph: ModelGraph, model: torch.nn.Module, x: tuple[Tensor, ...]) -> Any:
    return outputs_of(apply(plan, model, x, graph=graph).module, copies(x))


def copies(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in x)
