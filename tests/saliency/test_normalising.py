"""Values of several groups on one scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.errors import InputError
from edgeprune.graph import ModelGraph
from edgeprune.saliency import CRITERIA, NORMALISATIONS, Saliency, Values, normalised, score
from tests.saliency.networks import residual

pytestmark = pytest.mark.unit


def of(graph: ModelGraph) -> Saliency:
    """Every group worth 0, 1, 2, ...; the block 10 times what is inside of it."""
    channels = {group.id: np.arange(float(group.num_channels)) for group in graph.groups}
    blocks = {b.id: 10 * sum(float(channels[g].sum()) for g in b.inside) for b in graph.blocks}
    return Saliency(channels=channels, blocks=blocks, unit="apples")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [0.0, 1.0, 2.0, 3.0]),
        ("sum", [0.0, 1 / 6, 2 / 6, 3 / 6]),
        ("max", [0.0, 1 / 3, 2 / 3, 1.0]),
        ("mean", [0.0, 4 / 6, 8 / 6, 2.0]),
        ("layers", [0.0, 3 / 6, 6 / 6, 9 / 6]),  # two layers make it (one of them depthwise), one reads it
        ("euclid", [0.0, 1 / np.sqrt(14), 2 / np.sqrt(14), 3 / np.sqrt(14)]),
        ("rank", [1 / 4, 2 / 4, 3 / 4, 1.0]),
    ],
)
def test_by_hand(how: str, expected: list[float]) -> None:
    _, graph = residual()
    (group,) = (g for g in graph.groups if g.num_channels == 4)
    found = normalised(of(graph), NORMALISATIONS[how], graph)
    np.testing.assert_allclose(found.channels[group.id], expected, rtol=1e-12)
    (block,) = graph.blocks
    assert block.inside == (group.id,)
    assert found.blocks[block.id] == pytest.approx(10 * sum(expected)), "ten times what is inside of it, as before"
    assert found.normalise == how and (found.unit == "apples") == (how == "none")


def test_a_stream_counts_in_every_layer_that_it_couples() -> None:
    """`l2` takes the mean over the stream's two producers and two consumers, `layers` the sum.

    With the mean, a stream through twenty layers is as cheap to cut as the two layers of one block.
    """
    model, graph = residual()
    sums = {
        how: [float(score("l2", graph, model, normalise=how).channels[group.id].sum()) for group in graph.groups]
        for how in ("none", "layers")
    }
    assert [group.id for group in graph.groups] == ["depthwise.bias:0", "head.weight:1", "inner.weight:1"]
    assert sums["none"] == pytest.approx([1.0, 1.0, 1.0])
    assert sums["layers"] == pytest.approx([3.0, 2.0, 4.0]), "the last one is the stream"


def test_equal_values_have_equal_ranks() -> None:
    np.testing.assert_allclose(NORMALISATIONS["rank"].change(np.array([5.0, 1.0, 5.0])), [2.5 / 3, 1 / 3, 2.5 / 3])


def test_a_block_without_groups_follows_all_channels() -> None:
    from tests.test_saliency import layer

    _, graph = layer()
    before = of(graph)
    (empty,) = (b.id for b in graph.blocks if not b.inside)
    before = Saliency(channels=before.channels, blocks={**before.blocks, empty: 7.0})
    after = normalised(before, NORMALISATIONS["sum"], graph)
    total = sum(float(v.sum()) for v in before.channels.values())
    assert after.blocks[empty] == pytest.approx(7.0 * len(graph.groups) / total)


@given(
    arrays(np.float64, st.integers(1, 6), elements=st.floats(0, 1e6).filter(lambda v: v == 0 or v > 1e-6)),
    st.sampled_from(sorted(NORMALISATIONS)),
    st.floats(0.01, 100),
)
def test_order_stays_and_scale_goes(values: Values, how: str, scale: float) -> None:
    if not values.any():
        return
    change = NORMALISATIONS[how].change
    found = change(values)
    assert (found >= 0).all() and np.isfinite(found).all()
    assert (np.sign(np.subtract.outer(found, found)) * np.sign(np.subtract.outer(values, values)) >= 0).all()
    if how != "none":
        np.testing.assert_allclose(change(values * scale), found, rtol=1e-9)


def test_a_group_that_is_worth_nothing_stays() -> None:
    _, graph = residual()
    nothing = Saliency(
        channels={g.id: np.zeros(g.num_channels) for g in graph.groups}, blocks={graph.blocks[0].id: 2.0}
    )
    for how in NORMALISATIONS.values():
        found = normalised(nothing, how, graph)
        assert not any(v.any() for v in found.channels.values()) and found.blocks == nothing.blocks


def test_the_criterion_has_its_own_way_unless_told() -> None:
    model, graph = residual()
    own, raw, ranks = (score("bn_scale", graph, model, normalise=how) for how in (None, "none", "rank"))
    assert own.normalise == CRITERIA["bn_scale"].normalise == "none"
    for name, values in own.channels.items():
        assert (values == raw.channels[name]).all()
        assert ranks.channels[name].max() == 1.0
    with pytest.raises(InputError, match="no normalisation 'summ'; did you mean 'sum'"):
        score("l2", graph, model, normalise="summ")
