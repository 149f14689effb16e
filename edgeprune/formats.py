"""2:4 as a choice per layer: its variable counts the weights kept of every four, 2 or 4, beside the groups' widths.

So a format is one more width of a unit: cost tables, the solver and the trust region know of nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.device import Device
from edgeprune.eligibility import DENSE, FORMATS, TWO_OF_FOUR, refusal
from edgeprune.errors import InputError, did_you_mean
from edgeprune.graph import ModelGraph
from edgeprune.pattern import best_mask, matrix_of
from edgeprune.unit import SPARSE_WIDTH, Unit

WIDTHS = (SPARSE_WIDTH, 4)
PLACES = 8
"""How many layers an error names."""


@dataclass(frozen=True, kw_only=True)
class FormatValue:
    """What 2:4 takes of one layer: `lost`, the share of its magnitude under the mask; `groups`, whose channels' value
    that is a share of, each divided by the layers that the group is shared with."""

    parameter: str
    lost: float
    groups: Mapping[str, float]


def parse_formats(text: str) -> tuple[str, ...]:
    """`dense,2:4`; `InputError` for another format, or where dense is not among them."""
    formats = tuple(part.strip() for part in text.split(","))
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"no format '{name}'{did_you_mean(name, FORMATS)} (known: {', '.join(FORMATS)})")
    if DENSE not in formats:
        raise InputError(f"formats '{text}' leave out dense, which every layer has to be able to stay")
    return formats


def check_device(device: Device, formats: Sequence[str]) -> None:
    """`InputError` where 2:4 is wanted of a device without sparse tensor cores."""
    if TWO_OF_FOUR in formats and not device.sparse:
        raise InputError(
            f"device '{device.name}' has no sparse tensor cores, so 2:4 would cost value and gain nothing there: leave "
            "out --formats, or set 'sparse: true' in its entry of devices.yaml if it has them (NVIDIA, compute "
            "capability 8.0 or later)"
        )


def parameter_of(unit: Unit, graph: ModelGraph) -> str | None:
    """The qualified name of the weight that a unit multiplies by."""
    return next((name for name in (f"{unit.name}.weight", unit.name) if name in graph.parameter_shapes), None)


def with_formats(units: Sequence[Unit], graph: ModelGraph) -> tuple[Unit, ...]:
    """The units, with a format to choose where a layer can be 2:4 at its own widths or at narrower ones."""
    readers = Counter(parameter for node in graph.nodes for parameter in node.parameters)
    found = []
    for unit in units:
        parameter = parameter_of(unit, graph)
        alone = parameter is not None and readers[parameter] == 1
        aligned = replace(unit.dense, c_in=unit.dense.groups * 32, c_out=unit.dense.groups * 32)
        can = alone and refusal(aligned) is None and unit.kernel_groups.at(graph.dense_widths) == 1
        found.append(replace(unit, format=f"format {parameter}") if can else unit)
    return tuple(found)


def check_layers(units: Sequence[Unit], graph: ModelGraph) -> None:
    """`InputError` with the reason for each layer where none can be 2:4 as it is."""
    reasons = [(parameter_of(unit, graph), refusal(unit.dense)) for unit in units]
    layers = [(name, why) for name, why in reasons if name is not None]
    if all(why is not None for _, why in layers):
        told = "".join(f"\n  {name}: {why}" for name, why in layers[:PLACES])
        more = f"\n  and {len(layers) - PLACES} more" if len(layers) > PLACES else ""
        raise InputError(f"no layer can be 2:4:{told}{more}")


def format_values(units: Iterable[Unit], graph: ModelGraph) -> dict[str, FormatValue]:
    """For every unit with a format what 2:4 takes of it, from the weights of the traced model.

    A layer makes the channels of its output; where no group is there, it reads those of its input. The layers that make
    (read) the same group share its value.
    """
    listed = [unit for unit in units if unit.format]
    tensors = dict(graph.model.named_parameters(remove_duplicate=False)) if graph.model is not None else {}
    groups_of = {unit.format: unit.c_out.groups or unit.c_in.groups for unit in listed}
    sharing = Counter(group for groups in groups_of.values() for group in groups)
    found = {}
    for unit in listed:
        parameter = unit.format.removeprefix("format ")
        lost = _lost(tensors[parameter]) if parameter in tensors else 0.5
        shares = {group: 1.0 / sharing[group] for group in groups_of[unit.format]}
        found[unit.format] = FormatValue(parameter=parameter, lost=lost, groups=shares)
    return found


def _lost(weight: object) -> float:
    """Share of magnitude under the mask, of the weights as far as they come in fours."""
    import torch

    assert isinstance(weight, torch.Tensor)
    W = matrix_of(weight.detach()[:, : weight.shape[1] // 4 * 4]).abs().double()
    total = float(W.sum())
    return 1.0 - float(W[best_mask(W)].sum()) / total if total else 0.0


def formats_of(units: Iterable[Unit], widths: Mapping[str, int], vanishing: frozenset[str]) -> dict[str, str]:
    """A plan's formats at the chosen widths: the layers that stay and run as 2:4."""
    chosen = [unit for unit in units if unit.format and unit.name not in vanishing]
    return {
        unit.format.removeprefix("format "): TWO_OF_FOUR
        for unit in chosen
        if unit.kernel(widths).sparsity == TWO_OF_FOUR
    }
