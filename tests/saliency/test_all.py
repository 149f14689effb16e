"""What holds for every criterion, and what the registry and the documents say of it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.data import Data, as_data
from edgeprune.errors import InputError
from edgeprune.graph import ModelGraph, trace
from edgeprune.graph.structure import Group, Indices
from edgeprune.saliency import CRITERIA, NORMALISATIONS, score
from tests.saliency.networks import attention, pictures, residual

pytestmark = pytest.mark.unit
DRAWN = {"random", "hessian"}
"""What draws a number for every channel or weight depends on their order."""


@pytest.mark.parametrize("net", ["residual", "attention"])
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_values_are_finite_and_not_negative(name: str, net: str) -> None:
    """On streams that several layers share, depthwise convolutions, heads that only matmuls read."""
    model, graph, data = attention() if net == "attention" else (*residual(), pictures())
    if (name, net) == ("bn_scale", "attention"):
        pytest.skip("no batch norm in it")
    found = score(name, graph, model, data)
    assert found.channels.keys() == {group.id for group in graph.groups}
    assert found.blocks.keys() == {block.id for block in graph.blocks}
    for group in graph.groups:
        values = found.channels[group.id]
        assert values.dtype == np.float64 and values.shape == (group.num_channels,)
        assert np.isfinite(values).all() and (values >= 0).all()
    assert all(np.isfinite(value) and value >= 0 for value in found.blocks.values())
    assert any(values.max() > values.min() for values in found.channels.values()), "it tells channels apart"
    assert (found.num_samples > 0) == (CRITERIA[name].data != "none")


def shuffled(model: torch.nn.Module, group: Group, order: Indices) -> torch.nn.Module:
    """The same function with channel `order[c]` of the group in the place of c, in all members."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for member in group.members:
        index = torch.tensor([int(np.flatnonzero(member.channels == channel)[0]) for channel in order])
        state[member.parameter].copy_(state[member.parameter].index_select(member.dim, index))
    return model


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - DRAWN))
def test_values_move_with_their_channels(name: str) -> None:
    model, graph = residual()
    data = pictures()
    before = score(name, graph, model, data)
    for group in graph.groups:
        order = np.random.default_rng(0).permutation(group.num_channels)
        other = shuffled(model, group, order)
        with torch.no_grad():
            x, _ = next(data.batches(8))
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
        after = score(name, trace(other, (torch.ones(1, 3, 8, 8),)), other, data)
        largest = before.channels[group.id].max()
        for own in graph.groups:
            expected = before.channels[own.id][order] if own.id == group.id else before.channels[own.id]
            np.testing.assert_allclose(after.channels[own.id], expected, rtol=1e-2, atol=1e-4 * largest)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_channel_that_nothing_makes_or_reads_is_worth_least(name: str) -> None:
    """All its slices are zero; what is random apart."""
    model, graph = residual()
    (group,) = (g for g in graph.groups if g.num_channels == 7)
    with torch.no_grad():
        model.last.weight[3] = 0
        assert model.last.bias is not None
        model.last.bias[3] = 0
        model.head.weight[:, 3] = 0
    values = score(name, graph, model, pictures()).channels[group.id]
    if name == "random":
        assert (values > 0).all()
    elif name == "fpgm":
        assert values[3] > 0, "zeros are far from filters that are large"
    elif name == "bn_scale":
        assert values[3] == 0, "no batch norm there: the share of the weights"
    else:
        assert values[3] == pytest.approx(0, abs=1e-9 * values.max()) and values.max() > 0


def labelled() -> list[str]:
    return sorted(name for name, found in CRITERIA.items() if found.data == "labels")


@pytest.mark.parametrize("name", labelled())
def test_labels_that_are_missing_are_asked_for(name: str) -> None:
    model, graph = residual()
    with pytest.raises(InputError, match=f"saliency '{name}' needs labels and no data is given: give class folders"):
        score(name, graph, model)
    with pytest.raises(InputError, match="needs labels and the data is 4 unlabelled samples: give class folders"):
        score(name, graph, model, as_data([torch.ones(4, 3, 8, 8)]))


def test_the_criteria_that_need_labels() -> None:
    assert labelled() == ["grasp", "snip", "taylor_activation", "taylor_squared", "taylor_weight"]


def test_only_what_says_so_looks_at_data() -> None:
    """Given samples that can't be read, a criterion without data need gives the same values."""

    def unreadable(item: int, view: int, seed: int) -> None:
        raise AssertionError("read")

    model, graph = residual()
    data = Data(names=("a", "b"), labels=(0, 1), read=unreadable, items=(0, 1))
    for name, found in CRITERIA.items():
        if found.data == "none":
            with_data, without = score(name, graph, model, data), score(name, graph, model)
            for group in graph.groups:
                assert (with_data.channels[group.id] == without.channels[group.id]).all()
        else:
            with pytest.raises(AssertionError, match="read"):
                score(name, graph, model, data)


def test_a_model_of_two_inputs_can_be_valued_without_data() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = (torch.nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.left(x) * self.right(y))
            return logits

    model = Two().eval()
    graph: ModelGraph = trace(model, (torch.ones(1, 2), torch.ones(1, 2)))
    assert score("l2", graph, model).channels
    with pytest.raises(InputError, match="the model has 2 inputs; name a saliency that needs no data, like l2"):
        score("taylor", graph, model)


def test_every_entry_says_what_a_user_has_to_know() -> None:
    for name, found in CRITERIA.items():
        assert found.name == name and found.text.endswith(".") and found.source and found.normalise in NORMALISATIONS
        assert (found.forward, found.backward) != ("0", "0") or found.data == "none"
        assert len(found.text) <= 125


def test_the_document_lists_every_criterion() -> None:
    """docs/criteria.md has a row for each, with its data need, what it values and its normalisation."""
    page = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text()
    text = page.partition("## Which to take")[0]  # below it are the measured ones
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    listed = {row[0].strip("`"): row[1:4] for row in rows if row[0].strip("`") in CRITERIA}
    assert listed == {name: [c.data, c.granularity, c.normalise] for name, c in CRITERIA.items()}
