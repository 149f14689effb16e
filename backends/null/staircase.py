"""What the null device would take: a roofline over tiles of channels, so that latency is a staircase in both widths.

    time = LAUNCH_US + max(macs over padded channels / MACS_PER_US, bytes / BYTES_PER_US)

c_in is padded to a multiple of 8, c_out to 16; grouped convolutions pad c_out only and reach a quarter of the peak. A
network costs CONTEXT times the sum of its kernels, plus NETWORK_US; a kernel alone pays ALONE_US for its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.kernel import Kernel

VERSION = "1"  # of these constants: part of the fingerprint
C_IN_TILE = 8
C_OUT_TILE = 16
MACS_PER_US = 50_000.0
BYTES_PER_US = 20_000.0
GROUPED_SHARE = 0.25
LAUNCH_US = 2.0
ALONE_US = 6.0
CONTEXT = 0.93
NETWORK_US = 12.0


def padded_macs(kernel: Kernel) -> int:
    if kernel.operator not in ("conv", "linear"):
        return kernel.macs
    positions = prod(kernel.spatial_out) * (prod(kernel.window) if kernel.operator == "conv" else 1)
    c_in = kernel.c_in // kernel.groups
    if kernel.groups == 1:
        c_in = -(-c_in // C_IN_TILE) * C_IN_TILE
    return kernel.batch * positions * c_in * (-(-kernel.c_out // C_OUT_TILE) * C_OUT_TILE)


def time_us(kernel: Kernel) -> float:
    """Modelled time of the compute node alone, in microseconds."""
    peak = MACS_PER_US * (GROUPED_SHARE if kernel.groups > 1 else 1.0)
    return LAUNCH_US + max(padded_macs(kernel) / peak, kernel.num_bytes / BYTES_PER_US)


def document(
    kernels: Sequence[Kernel],
    inputs: Sequence[dict[str, Any]] | None = None,
    outputs: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The model file of one kernel, or of a network with its inputs and outputs ({"name", "dtype", "shape"})."""
    alone = len(kernels) == 1 and inputs is None
    first, last = kernels[0], kernels[-1]
    shape_in = [first.batch, first.c_in, *first.spatial]
    shape_out = [last.batch, last.c_out, *last.spatial_out]
    return {
        "schema": 1,
        "factor": 1.0 if alone else CONTEXT,
        "offset_us": ALONE_US if alone else NETWORK_US,
        "kernels": [{"name": k.key, "type": k.family, "time_us": round(time_us(k), 4)} for k in kernels],
        "inputs": list(inputs or [{"name": "x", "dtype": "float32", "shape": shape_in}]),
        "outputs": list(outputs or [{"name": "y", "dtype": "float32", "shape": shape_out}]),
    }
