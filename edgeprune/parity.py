"""Whether an engine computes what the torch module computes, within a tolerance stated for its precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.bundle_engine import output_error
from edgeprune.engine import Calibration, Engine
from edgeprune.errors import QualityError
from edgeprune.ranges import drawn_batches

if TYPE_CHECKING:
    import torch

    from edgeprune.pruned import Pruned
    from edgeprune.transport import Session

Array = npt.NDArray[Any]

TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 0.3}
"""Largest allowed max|a - b| / max|b|, a the engine's output, b torch's in fp32; by the coarser of the precision of the
arithmetic and that of the stored weights."""
CALIBRATED = 4
"""Batches of the calibration that an engine in int8 is compared on."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Inputs of one inference in order, and the outputs that torch gives for them."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The worst output over `samples`: `error` is max|a - b| / max|b|."""

    error: float
    tolerance: float
    output: str
    samples: int

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def samples(
    pruned: Pruned, *, pictures: Sequence[torch.Tensor] = (), calibration: Calibration = (), seed: int = 0
) -> tuple[Sample, ...]:
    """What torch answers to the example inputs, to seeded normal values of their shapes, and to given pictures.

    A picture is one batch for the first input. Where the ranges of an engine were found on batches of `calibration`,
    the first of these take the place of drawn values, which lie outside of the ranges: integers saturate there. A
    module that raises on drawn values (they are no token ids, say) is compared without them.
    """
    examples = pruned.example_inputs
    given = [
        *(calibration[:CALIBRATED] or (examples,)),
        *((picture.to(examples[0].dtype), *examples[1:]) for picture in pictures),
    ]
    found = [_sample(pruned.module, batch) for batch in given]
    if not calibration:
        with suppress(ArithmeticError, LookupError, RuntimeError, ValueError):
            found[1:1] = [_sample(pruned.module, batch) for batch in drawn_batches(examples, count=1, seed=seed)]
    return tuple(found)


def _sample(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Sample:
    import torch

    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            result = module(*inputs)
    finally:
        for part in training:
            part.training = True
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return Sample(inputs=tuple(t.numpy() for t in inputs), outputs=tuple(leaf.numpy() for leaf in leaves))


def tolerance_of(engine: Engine) -> float:
    """Of its outputs, relative to the largest one of torch."""
    return max(TOLERANCES[engine.precision], TOLERANCES.get(engine.notes.get("weights", ""), 0.0))


def check_parity(session: Session, key: str, engine: Engine, expected: Sequence[Sample]) -> Parity:
    """Run a loaded engine on the samples; `QualityError` when an output is further off than the tolerance."""
    tolerance = tolerance_of(engine)
    errors: dict[str, float] = {}
    for sample in expected:
        found = session.run(key, fed(engine, sample))
        for name, error in output_errors(engine, found, sample).items():
            errors[name] = max(error, errors.get(name, 0.0))
    worst = max(errors, key=lambda name: errors[name])
    parity = Parity(error=errors[worst], tolerance=tolerance, output=worst, samples=len(expected))
    if not parity.error <= tolerance:
        raise QualityError(
            f"the engine's output '{worst}' is off from torch's by {parity.error:.2g} of its largest value, at most "
            f"{tolerance:g} is allowed at {engine.precision}; nothing is handed over"
        )
    return parity


def fed(engine: Engine, sample: Sample) -> list[Array]:
    """The inputs of a sample as the engine takes them: images with their channels last where it was exported so."""
    if engine.notes.get("layout") != "channels last":
        return list(sample.inputs)
    return [np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x for x in sample.inputs]


def shape_in_torch(engine: Engine) -> tuple[int, ...]:
    """Of the first input as the torch module takes it, whose images have their channels first."""
    shape = tuple(engine.inputs[0].shape)
    if engine.notes.get("layout") != "channels last" or len(shape) != 4:
        return shape
    return shape[0], shape[3], shape[1], shape[2]


def output_errors(engine: Engine, found: Sequence[Array], sample: Sample) -> Mapping[str, float]:
    """max|a - b| / max|b| of each output by name; infinite where one is not finite."""
    if len(found) != len(sample.outputs):
        raise QualityError(f"the engine has {len(found)} outputs, the torch module {len(sample.outputs)}")
    errors = {}
    for spec, a, b in zip(engine.outputs, found, sample.outputs, strict=True):
        if a.shape != b.shape:
            raise QualityError(f"the engine's output '{spec.name}' has shape {a.shape}, torch's {b.shape}")
        errors[spec.name] = output_error(a, b)
    return errors
