"""What a modelled device would take: its roofline (`edgeprune.roofline`) over the kernels of a model.

The null device is one set of parameters: 100 GFLOPS over tiles of 8 channels in and 16 out, a quarter of that where
there are groups, 20 GB/s; 2:4 computes 1.6 times as fast and takes 1 us more a kernel. A network costs 0.93 times the
sum of its kernels plus 12 us; a kernel alone 6 us for copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeprune import roofline as model
from edgeprune.roofline import Roofline

if TYPE_CHECKING:
    from edgeprune.kernel import Kernel

VERSION = "1"  # of the formula and these parameters: part of the fingerprint
ALONE_US = 6.0
NULL = Roofline(
    peak_gflops=100.0,
    grouped_gflops=25.0,
    attention_gflops=25.0,
    bandwidth_gbs=20.0,
    overhead_us=2.0,
    sparse_gain=1.6,
    sparse_us=1.0,
    c_in_step=8,
    c_out_step=16,
    context=0.93,
    alone_us=ALONE_US,
    network_us=12.0,
    conditions="no device at all",
    sources=("invented",),
)


def time_us(kernel: Kernel) -> float:
    """Modelled time of the compute node alone on the null device, in microseconds."""
    return model.time_us(kernel, NULL)


def document(
    kernels: Sequence[Kernel],
    inputs: Sequence[dict[str, Any]] | None = None,
    outputs: Sequence[dict[str, Any]] | None = None,
    roofline: Roofline = NULL,
) -> dict[str, Any]:
    """The model file of one kernel, or of a network with its inputs and outputs ({"name", "dtype", "shape"})."""
    alone = len(kernels) == 1 and inputs is None
    first, last = kernels[0], kernels[-1]
    shape_in = [first.batch, first.c_in, *first.spatial]
    shape_out = [last.batch, last.c_out, *last.spatial_out]
    return {
        "schema": 1,
        "factor": 1.0 if alone else roofline.context,
        "offset_us": roofline.alone_us if alone else roofline.network_us,
        "kernels": [
            {"name": k.key, "type": k.family, "time_us": round(model.time_us(k, roofline), 4)} for k in kernels
        ],
        "inputs": list(inputs or [{"name": "x", "dtype": "float32", "shape": shape_in}]),
        "outputs": list(outputs or [{"name": "y", "dtype": "float32", "shape": shape_out}]),
    }
