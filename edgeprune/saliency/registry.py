"""What a criterion gives, what it needs, and how it is found by name. Values: higher = keep, never < 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.data import Data, synthetic
from edgeprune.errors import InputError, did_you_mean
from edgeprune.graph.structure import ModelGraph

Values: TypeAlias = npt.NDArray[np.float64]
DataNeed: TypeAlias = Literal["none", "unlabelled", "labels"]
Granularity: TypeAlias = Literal["channels", "blocks", "both"]


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """`channels[group id]` float64 [num_channels], `blocks[block id]`, in `unit`.

    A block's value is what its drop costs as a whole, blocks within it included. `is_synthetic` tells that the samples
    were random, `normalise` what was done to the criterion's own values (`normalising`).
    """

    channels: Mapping[str, Values]
    blocks: Mapping[str, float]
    criterion: str = ""
    unit: str = ""
    num_samples: int = 0
    is_synthetic: bool = False
    normalise: str = "none"


Rule: TypeAlias = Callable[[ModelGraph, torch.nn.Module, Data, int], Saliency]  # (graph, dense model, data, seed)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion and what a user has to know before choosing it.

    `text` is one line, `source` the paper and its equation. `data`: none; unlabelled samples (random ones where there
    are none); samples with labels. `granularity` is what the criterion itself values: what it doesn't follows from what
    it does. `forward` and `backward` count passes over the calibration samples (`reading.look_at`). `normalise` is
    applied unless another is asked for.
    """

    name: str
    text: str
    source: str
    data: DataNeed
    granularity: Granularity
    forward: str
    backward: str
    normalise: str
    rule: Rule


CRITERIA: dict[str, Criterion] = {}


def criterion(
    *,
    source: str,
    data: DataNeed = "none",
    granularity: Granularity = "channels",
    forward: str = "0",
    backward: str = "0",
    normalise: str = "none",
) -> Callable[[Rule], Rule]:
    """Register a criterion under its function's name; the first line of its docstring says what it is."""

    def register(rule: Rule) -> Rule:
        name = rule.__name__
        CRITERIA[name] = Criterion(
            name=name,
            text=(rule.__doc__ or "").strip().split("\n")[0],
            source=source,
            data=data,
            granularity=granularity,
            forward=forward,
            backward=backward,
            normalise=normalise,
            rule=rule,
        )
        return rule

    return register


def score(
    name: str,
    graph: ModelGraph,
    model: torch.nn.Module,
    data: Data | None = None,
    *,
    seed: int = 0,
    normalise: str | None = None,
) -> Saliency:
    """The values that criterion `name` gives the channels and blocks of the dense `model`, which is left as it is.

    Without data the criteria that look at samples get random ones of the shape that was traced; those that look at
    labels raise `InputError`. `normalise` is one of `NORMALISATIONS`, the criterion's own unless told.
    """
    from edgeprune.saliency.normalising import find_normalisation, normalised

    found = check_data(name, data, graph)
    how = find_normalisation(normalise or found.normalise)
    if data is None:
        data = synthetic((1,) if found.data == "none" else input_shape(graph), seed=seed)
    values = found.rule(graph, model, data, seed)
    values = replace(values, criterion=name, is_synthetic=values.num_samples > 0 and data.is_synthetic)
    return normalised(values, how, graph)


def find_criterion(name: str) -> Criterion:
    """The criterion of that name; `InputError` where there is none."""
    if name not in CRITERIA:
        raise InputError(f"no saliency '{name}'{did_you_mean(name, CRITERIA)} (known: {', '.join(sorted(CRITERIA))})")
    return CRITERIA[name]


def check_data(name: str, data: Data | None, graph: ModelGraph | None = None) -> Criterion:
    """The criterion of that name; `InputError` where it needs labels that the data lacks, or any data at all.

    Which integers a model takes isn't known, so with the `graph` of one that takes them samples have to be given.
    """
    found = find_criterion(name)
    if found.data == "labels" and (data is None or data.labels is None):
        given = "no data is given" if data is None else f"the data is {data.describe()}"
        raise InputError(
            f"saliency '{name}' needs labels and {given}: give class folders, a CSV path,label, an npz with y or "
            "batches (x, y), or take a saliency that needs none, like taylor_output"
        )
    if found.data != "none" and data is None and graph is not None:
        check_random_input(name, graph)
    return found


def check_random_input(name: str, graph: ModelGraph) -> None:
    """`InputError` where a model takes integers, for a criterion that would make its input itself."""
    dtype = input_type(graph)
    if not dtype.is_floating_point:
        raise InputError(
            f"saliency '{name}' looks at samples, and which values of {str(dtype).partition('.')[2]} the model takes "
            "isn't known: give data, or take a saliency that looks at weights alone, like l2"
        )


def input_type(graph: ModelGraph) -> torch.dtype:
    """Of the model's first input, which data is for."""
    first = next(node for node in graph.program.graph.nodes if node.name == graph.program.inputs[0])
    dtype: torch.dtype = first.meta["val"].dtype
    return dtype


def input_shape(graph: ModelGraph) -> tuple[int, ...]:
    """The traced shape of the model's one input; `InputError` where there are several."""
    user = set(graph.program.inputs)
    shapes = [tuple(n.meta["val"].shape) for n in graph.program.graph.nodes if n.name in user]
    if len(shapes) != 1:
        raise InputError(f"the model has {len(shapes)} inputs; name a saliency that needs no data, like l2")
    return shapes[0]
