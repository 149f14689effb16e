"""A few small kernels through a device's real runtime, and what its owner wants to see of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.device_checks import Check
from edgeprune.device_probe import Opener
from edgeprune.errors import EdgepruneError, MeasurementError
from edgeprune.kernel import Kernel
from edgeprune.measurement import Loaded, Measurement, NodeTimes, SessionLost, Timing
from edgeprune.modelled import backend_of
from edgeprune.precision import refusal, shares_of
from edgeprune.references import COMPUTE, MEMORY, reference_kernels
from edgeprune.transport import Session, open_session

if TYPE_CHECKING:
    from edgeprune.device import Device

TIMING = Timing(min_rounds=5, max_rounds=10, max_seconds=10.0, tolerance=0.05)
SPARSE = Kernel(
    operator="conv",
    c_in=256,
    c_out=256,
    spatial=(28, 28),
    window=(1, 1),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    precision="fp16",
    sparsity="2:4",
)
"""A pointwise convolution of the least width at which 2:4 pays."""


def self_test(device: Device, opener: Opener = open_session) -> Iterator[Check]:
    """One check a question: does it build, compute and hold still; in which precision; are sparse kernels picked.

    Modelled devices have nothing to test. A failure is a broken check, never an exception.
    """
    if device.modelled:
        yield Check(name="self-test", found=None, fix=f"device '{device.name}' is modelled: there is nothing to run")
        return
    try:
        with opener(device) as session, tempfile.TemporaryDirectory(prefix="edgeprune-test-") as folder:
            yield from _kernels(session, device, Path(folder))
            if device.sparse and "fp16" in device.precisions and device.backend.startswith("tensorrt"):
                yield _sparse(session, device, Path(folder))
    except EdgepruneError as error:
        yield Check(name="self-test", found=None, fix=str(error), required=True, exit_code=error.exit_code)


def _kernels(session: Session, device: Device, folder: Path) -> Iterator[Check]:
    precision = device.precisions[0]
    kernels = reference_kernels(precision)
    backend = backend_of(device, only_to_time=True)
    loaded = {name: session.load(name, backend.build(kernel, folder), profile=True) for name, kernel in kernels.items()}
    yield Check(name="builds", found=", ".join(kernel.key for kernel in kernels.values()), required=True)
    yield _computes(session, loaded[COMPUTE])
    measured = session.measure([COMPUTE], [MEMORY], timing=TIMING)
    yield from _timed(kernels[COMPUTE], measured)
    yield _precision(kernels[COMPUTE], loaded[COMPUTE], session.node_times(COMPUTE))


def _computes(session: Session, loaded: Loaded) -> Check:
    """Twice the same inputs, then others: finite, the same, other."""
    generator = np.random.default_rng(0)
    first = [generator.standard_normal(spec.shape).astype(spec.dtype) for spec in loaded.inputs]
    other = [(array * 2 + 1).astype(array.dtype) for array in first]
    once, twice, else_ = (session.run(loaded.key, inputs)[0].astype(np.float64) for inputs in (first, first, other))
    good = bool(np.isfinite(once).all() and np.allclose(once, twice, rtol=1e-3) and not np.allclose(once, else_))
    spread = f"outputs of {once.size} values, standard deviation {float(once.std()):.3g}"
    fix = (
        "outputs are not finite, not the same twice, or don't depend on the input: is the runtime's installation whole?"
    )
    return Check(name="computes", found=spread, fix=None if good else fix, required=True)


def _timed(kernel: Kernel, measured: Measurement) -> Iterator[Check]:
    median_us, p90_us = (measured.percentile_us(COMPUTE, percentile) for percentile in (50.0, 90.0))
    ratio = measured.ratio(COMPUTE, MEMORY)
    found = (
        f"p50 {median_us / 1e3:.3f} ms, p90 {p90_us / 1e3:.3f} ms, {2 * kernel.macs / median_us / 1e3:.1f} GFLOPS end "
        f"to end, {ratio.rounds} rounds within {ratio.spread:.1%}"
    )
    noisy = ratio.spread > 0.05
    fix = "rounds differ by more than 5 %: end other work there, hold the clocks (--lock-clocks), let it cool down"
    yield Check(name="times", found=found, fix=fix if noisy else None, word="noisy")
    shown = ", ".join(f"{name} {value:g}" for name, value in measured.machine.items())
    slowed = f"slowed down meanwhile by {'; '.join(measured.slowed)}" if measured.slowed else None
    yield Check(name="meanwhile", found=shown or "no clocks, no temperature told", fix=slowed, word="slow")


def _precision(kernel: Kernel, loaded: Loaded, nodes: NodeTimes | None) -> Check:
    shares = shares_of(nodes) or loaded.notes.get("ran_in")
    told = ", ".join(f"{share:.0%} {name}" for name, share in shares.items()) if shares else "the runtime doesn't tell"
    return Check(name="precision", found=told, fix=refusal(kernel, shares), required=True)


def _sparse(session: Session, device: Device, folder: Path) -> Check:
    """Dense and 2:4 of the same kernel: whether a sparse tactic was picked, and what it brings."""
    backend = backend_of(device, only_to_time=True)
    try:
        loaded = {
            name: session.load(name, backend.build(kernel, folder))
            for name, kernel in (("2:4", SPARSE), ("dense", replace(SPARSE, sparsity="dense")))
        }
        measured = session.measure(["2:4"], ["dense"], timing=TIMING)
    except SessionLost:
        raise
    except (MeasurementError, ValueError) as error:
        return Check(name="2:4", found=None, fix=str(error))
    picked = loaded["2:4"].notes.get("sparse")
    words = {True: "sparse tactic picked", False: "dense tactic picked", None: "TensorRT doesn't tell what it picked"}
    ratio = measured.ratio("2:4", "dense")
    return Check(name="2:4", found=f"{words[picked]}, {ratio.value:.3f}x of the time of the dense {SPARSE.key}")
