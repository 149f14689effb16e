"""What makes values of different groups comparable: a function over a `Saliency`, one group at a time.

A plan is chosen over all groups at once, so it is as good as the scale that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import rankdata

from edgeprune.errors import InputError, did_you_mean
from edgeprune.graph.structure import ModelGraph
from edgeprune.saliency.members import contractions
from edgeprune.saliency.registry import Saliency, Values


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """`change` maps the values of one group, float64 [num_channels], some of them > 0; `unit` is what they are then.

    `by_layers` multiplies them by the number of layers that the group couples: its producers and consumers.
    """

    name: str
    text: str
    unit: str
    change: Callable[[Values], Values]
    by_layers: bool = False


def _ranks(values: Values) -> Values:
    ranks: Values = rankdata(values) / len(values)
    return ranks


NORMALISATIONS: dict[str, Normalisation] = {
    n.name: n
    for n in (
        Normalisation(name="none", text="as the criterion defines them", unit="", change=lambda v: v),
        Normalisation(
            name="sum", text="shares of the group's sum", unit="share of a group", change=lambda v: v / v.sum()
        ),
        Normalisation(
            name="max", text="shares of the group's largest", unit="share of the largest", change=lambda v: v / v.max()
        ),
        Normalisation(name="mean", text="multiples of the group's mean", unit="means", change=lambda v: v / v.mean()),
        Normalisation(
            name="euclid",
            text="divided by the group's Euclidean norm",
            unit="share of the norm",
            change=lambda v: v / np.sqrt(np.square(v).sum()),
        ),
        Normalisation(
            name="layers",
            text="shares of the group's sum, in every layer that the group couples",
            unit="layers",
            change=lambda v: v / v.sum(),
            by_layers=True,
        ),
        Normalisation(name="rank", text="rank in the group / its channels, ties alike", unit="rank", change=_ranks),
    )
}


def find_normalisation(name: str) -> Normalisation:
    """The normalisation of that name; `InputError` where there is none."""
    if name not in NORMALISATIONS:
        known = ", ".join(NORMALISATIONS)
        raise InputError(f"no normalisation '{name}'{did_you_mean(name, NORMALISATIONS)} (known: {known})")
    return NORMALISATIONS[name]


def normalised(saliency: Saliency, how: Normalisation, graph: ModelGraph) -> Saliency:
    """Every group's values changed; a group whose values are all zero stays.

    A block keeps its worth in terms of what is inside of it: its value is multiplied by what the sum of all channels
    inside was multiplied by, or that of all channels of the model where it has none.
    """
    if how.name == "none":
        return saliency
    layers = {group.id: len(contractions(group)) if how.by_layers else 1 for group in graph.groups}
    channels = {n: how.change(v) * layers[n] if (v > 0).any() else v for n, v in saliency.channels.items()}
    everywhere = _factor(saliency.channels, channels, tuple(channels), 1.0)
    blocks = {
        block.id: saliency.blocks[block.id] * _factor(saliency.channels, channels, block.inside, everywhere)
        for block in graph.blocks
    }
    return replace(saliency, channels=channels, blocks=blocks, unit=how.unit, normalise=how.name)


def _factor(
    before: Mapping[str, Values], after: Mapping[str, Values], groups: tuple[str, ...], otherwise: float
) -> float:
    """What the sum of the groups' values was multiplied by."""
    total = sum(float(before[group].sum()) for group in groups)
    return sum(float(after[group].sum()) for group in groups) / total if total > 0 else otherwise
