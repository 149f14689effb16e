"""Batches on which ranges of activations are found: drawn ones where only time counts, else the user's data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgeprune.data import Data
    from edgeprune.engine import Calibration

DRAWN = 2


def drawn_batches(example_inputs: tuple[torch.Tensor, ...], *, count: int = DRAWN, seed: int = 0) -> Calibration:
    """Seeded normal values in the shapes of the inputs; integer inputs keep their example values, whose range is not
    known.

    For an engine that is only timed: how long it takes depends on which tensors are integers, not on their scales.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        tuple(
            torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
            for tensor in example_inputs
        )
        for _ in range(count)
    )


def batches_of(data: Data, example_inputs: tuple[torch.Tensor, ...], *, most: int | None = None) -> Calibration:
    """View 0 of the data as whole batches for the first input, the others as in the example.

    At most `most` samples; as many as a look at the data takes unless told (`Data.calibration_views`). `InputError`
    where the data doesn't fill one batch.
    """
    first, *others = example_inputs
    size = int(first.shape[0])
    if most is None:
        most = data.calibration_views()[0]
    batches = data.batches(size, limit=max(most, size))
    found = tuple((x.to(first.dtype), *others) for x, _ in batches if len(x) == size)
    if not found:
        raise InputError(f"{data.describe()} don't fill one batch of {size}, which calibration in int8 takes")
    return found
