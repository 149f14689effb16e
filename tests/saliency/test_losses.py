"""Measured criteria: what closing channels and dropping blocks does to the answers, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.data import as_data
from edgeprune.errors import InputError
from edgeprune.graph import trace
from edgeprune.plan_json import Plan
from edgeprune.quality import divergence
from edgeprune.saliency import score
from edgeprune.saliency.losses import closed, curve_values
from edgeprune.surgery import apply, positions_of
from tests.saliency.networks import HIDDEN, attention, even, pictures, residual, sequence, turned

pytestmark = pytest.mark.unit


def apart(logits: float) -> float:
    """KL of (1/2, 1/2) from a softmax whose two logits are that far apart."""
    return float(np.log(np.cosh(logits / 2)))


def test_loss_change_by_hand() -> None:
    """Logits (8, 8); without a channel (2, 8), (8, 4), (6, 4)."""
    model, graph, data = even()
    found = score("loss_change", graph, model, data)
    np.testing.assert_allclose(found.channels[HIDDEN], [apart(6), apart(4), apart(2)], rtol=1e-5)


def test_loss_curve_by_hand() -> None:
    """Closed in `taylor`'s order 2, 1: (6, 4), then (6, 0). The last goes on at the rate of 1, in the ratio 4.5 : 2."""
    model, graph, data = even()
    values = score("loss_curve", graph, model, data).channels[HIDDEN]
    second = apart(6) - apart(2)
    np.testing.assert_allclose(values, [second * 4.5 / 2, second, apart(2)], rtol=1e-5)


def test_a_curve_that_bends_down_is_raised() -> None:
    """Losses 1, 1.5 and 4 at one, two and three of four equal channels: steps 1, 1/2, 5/2, then 5/2 again."""
    values = curve_values(np.ones(4), [1, 2, 3], [1.0, 1.5, 4.0])
    np.testing.assert_allclose(values, [1.0, 1.0, 2.5, 2.5], rtol=1e-8)


def test_a_curve_is_what_was_measured_where_it_is_convex() -> None:
    """Within a depth the channels share what was measured as `taylor` has it: 1 : 3, then 3 : 5, then at that rate."""
    values = curve_values(np.array([1.0, 3.0, 3.0, 5.0, 6.0]), [2, 4], [4.0, 20.0])
    np.testing.assert_allclose(values, [1.0, 3.0, 6.0, 10.0, 12.0], rtol=1e-8)


def test_channels_without_any_value_share_alike() -> None:
    np.testing.assert_allclose(curve_values(np.zeros(4), [2, 3], [1.0, 2.0]), [0.5, 0.5, 1.0, 1.0], rtol=1e-8)


def test_many_channels_are_closed_in_chunks() -> None:
    """Sixteen channels in chunks of two, by `taylor`; what a chunk costs is shared by it."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 3, generator=generator).tolist()
    second = (torch.randn(2, 16, generator=generator) * 0.3).tolist()
    model, graph = sequence([[0.0, 0.0, 0.0]], first, second)
    data = as_data([(torch.randn(1, 3, generator=generator), torch.tensor([1]))])
    base = score("taylor", graph, model, data).channels[HIDDEN]
    values = score("loss_change", graph, model, data).channels[HIDDEN]
    x, _ = next(data.batches(1))
    for chunk in np.argsort(base).reshape(8, 2):
        weight = torch.tensor(second)
        weight[:, chunk] = 0
        closed_logits = x @ torch.tensor(first).T @ weight.T
        cost = float(divergence(model(x).detach(), closed_logits).mean())
        np.testing.assert_allclose(values[chunk], cost * base[chunk] / base[chunk].sum(), rtol=1e-4)


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_closed_channels_give_the_answers_of_the_pruned_network(net: str) -> None:
    """One channel of each group whose norms keep their statistics: the answers are those after surgery."""
    model, graph = residual() if net == "residual" else attention()[:2]
    x = torch.randn(1, 3, 8, 8) if net == "residual" else torch.randn(1, 5, 4)
    checked = 0
    for group in graph.groups:
        if group.changes_statistics:
            continue
        kept = positions_of(graph, group.id, np.arange(1, group.num_channels))
        plan = Plan(structure_hash=graph.structure_hash, kept={group.id: kept})
        pruned = apply(plan, model, (x,), graph=graph).module
        state = closed(model, group, np.array([0]))
        with torch.no_grad():
            answer = torch.func.functional_call(model, state, (x,))
            torch.testing.assert_close(answer, pruned(x), rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked == {"residual": 3, "attention": 4}[net]


def test_block_influence_by_hand() -> None:
    """(3, 4) and (-1, 7): cosine (-3 + 28) / (5 · √50) = 1 / √2."""
    model, graph, data = turned()
    found = score("block_influence", graph, model, data)
    assert found.blocks == {"0": pytest.approx(1 - np.sqrt(0.5), rel=1e-6)}
    shares = score("l2", graph, model, normalise="none").channels
    for group in graph.groups:
        np.testing.assert_allclose(found.channels[group.id], shares[group.id] * found.blocks["0"], rtol=1e-6)


def test_block_loss_by_hand() -> None:
    """Logits 0.8 apart with the branch, 0.1 without."""
    model, graph, data = turned()
    p, q = (np.exp(z) / np.exp(z).sum() for z in (np.array([-0.1, 0.7]), np.array([0.3, 0.4])))
    assert score("block_loss", graph, model, data).blocks == {"0": pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)}


def test_block_taylor_by_hand() -> None:
    """g = 0.1 f · (p - y) with f = (-4, 3) and p - y = p_1 (-1, 1): 0.7 p_1."""
    model, graph, data = turned()
    p = 1 / (1 + np.exp(-0.8))
    assert score("block_taylor", graph, model, data).blocks == {"0": pytest.approx((0.7 * p) ** 2 / 2, rel=1e-5)}


def test_block_taylor_is_the_measured_cost_of_a_small_branch() -> None:
    """To second order: with the branch's last layer scaled by 1/50, on samples that are many."""
    model, graph = residual()
    with torch.no_grad():
        for p in model.outer.parameters():
            p.mul_(0.02)
    data = as_data([next(pictures(400).batches(400))[0]])
    first, measured = (score(name, graph, model, data).blocks for name in ("block_taylor", "block_loss"))
    for block, cost in measured.items():
        assert first[block] == pytest.approx(cost, rel=0.5)


def test_channels_of_blocks() -> None:
    """Inside a block: its value, by the number of its groups; outside, an average block's."""
    model, graph = residual()
    found = score("block_loss", graph, model, pictures())
    shares = score("l2", graph, model, normalise="none").channels
    (block,) = graph.blocks
    for group in graph.groups:
        np.testing.assert_allclose(found.channels[group.id], shares[group.id] * found.blocks[block.id], rtol=1e-9)


@pytest.mark.parametrize("name", ["block_influence", "block_taylor", "block_loss"])
def test_a_model_without_blocks_is_told(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)).eval()
    graph = trace(model, (torch.ones(1, 2),))
    with pytest.raises(InputError, match=f"'{name}': this model has no block that may be dropped; take one"):
        score(name, graph, model)
