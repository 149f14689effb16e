"""The roofline: what a kernel would take on a device that is known by its data sheet alone. Its numbers are *modelled*.

    time_us = overhead_us + max(flops / (efficiency * peak), bytes / bandwidth)

`flops` are twice the multiply-accumulates over padded widths: c_in up to a multiple of `c_in_step`, c_out of
`c_out_step`; grouped convolutions pad c_out only. `bytes` are the weights, and of inputs and outputs together what does
not fit into the cache: weights are read anew in each inference, activations come from the kernel before.
"""

from __future__ import annotations

from math import prod
from typing import Annotated

from pydantic import BaseModel, Field

from edgeprune.eligibility import DENSE
from edgeprune.kernel import BYTES_PER_ELEMENT, Kernel

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Step = Annotated[int, Field(ge=1)]


class Roofline(BaseModel, frozen=True, extra="forbid"):
    """Parameters of one device at one precision, clock and power mode (`conditions`); `sources` says where from.

    Grouped convolutions run at `grouped_gflops`, products of activations head by head at `attention_gflops`; both are
    the peak unless told. A network takes `context` times the sum of its kernels and `network_us`, a kernel alone
    `alone_us` more than in a network.
    """

    peak_gflops: _Positive  # of the unit that runs contractions; one multiply-accumulate is two
    grouped_gflops: _Positive | None = None
    attention_gflops: _Positive | None = None
    efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the peak that kernels reach
    bandwidth_gbs: _Positive  # of the main memory, 1e9 bytes a second
    cache_mb: _NotNegative = 0.0  # 2**20 bytes, the last one that the computing cores share
    overhead_us: _NotNegative = 0.0  # of starting a kernel
    sparse_gain: Annotated[float, Field(ge=1)] = 1.0  # by which 2:4 raises the rate of arithmetic
    sparse_us: _NotNegative = 0.0  # what a 2:4 kernel takes beside that
    c_in_step: _Step = 1
    c_out_step: _Step = 1
    context: _Positive = 1.0
    alone_us: _NotNegative = 0.0
    network_us: _NotNegative = 0.0
    conditions: str
    sources: Annotated[tuple[str, ...], Field(min_length=1)]


def time_us(kernel: Kernel, roofline: Roofline) -> float:
    """Modelled time of the compute node alone, in microseconds."""
    flops_per_us = _gflops(kernel, roofline) * roofline.efficiency * 1e3
    bytes_per_us = roofline.bandwidth_gbs * 1e3
    overhead_us = roofline.overhead_us
    if kernel.sparsity != DENSE:
        flops_per_us *= roofline.sparse_gain
        overhead_us += roofline.sparse_us
    return overhead_us + max(
        2 * padded_macs(kernel, roofline) / flops_per_us, memory_bytes(kernel, roofline) / bytes_per_us
    )


def padded_macs(kernel: Kernel, roofline: Roofline) -> int:
    """Multiply-accumulates with the widths of convolutions and linears rounded up to the steps."""
    if kernel.operator not in ("conv", "linear"):
        return kernel.macs
    positions = prod(kernel.spatial_out) * (prod(kernel.window) if kernel.operator == "conv" else 1)
    c_in = kernel.c_in // kernel.groups
    if kernel.groups == 1:
        c_in = _padded(c_in, roofline.c_in_step)
    return kernel.batch * positions * c_in * _padded(kernel.c_out, roofline.c_out_step)


def memory_bytes(kernel: Kernel, roofline: Roofline) -> float:
    """Weights, and what of inputs and outputs exceeds the cache; of 2:4 weights half, and two bits each for where."""
    weights = elements = 0
    if kernel.operator in ("conv", "linear"):
        elements = kernel.c_out * kernel.c_in // kernel.groups * prod(kernel.window)
        weights = elements * BYTES_PER_ELEMENT[kernel.precision]
    activations = max(0.0, kernel.num_bytes - weights - roofline.cache_mb * 2**20)
    return activations + (weights if kernel.sparsity == DENSE else weights / 2 + elements / 8)


def _gflops(kernel: Kernel, roofline: Roofline) -> float:
    if kernel.groups == 1:
        return roofline.peak_gflops
    own = roofline.grouped_gflops if kernel.operator == "conv" else roofline.attention_gflops
    return own or roofline.peak_gflops


def _padded(width: int, step: int) -> int:
    return -(-width // step) * step
