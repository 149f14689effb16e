"""Networks in int8 as ONNX Runtime computes them: all that it has kernels for, or contractions alone.

Where there are layer norms the residual stream stays in float (`docs/precisions.md`). Whether there are is asked twice:
of the traced graph, for the units whose kernels are timed, and of the ONNX that is quantised. A layer or RMS norm
counts by its operator, or written out, as a root of a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from edgeprune.fusion import LAYER_NORMS

if TYPE_CHECKING:
    import onnx

    from edgeprune.engine import Calibration
    from edgeprune.graph import ModelGraph

T = TypeVar("T")
BETWEEN = 2
"""Operators at most between a mean and the root of it: an epsilon, a conversion."""


def has_layer_norm(graph: ModelGraph) -> bool:
    """Whether a traced graph has one."""
    nodes = {node.name: node for node in graph.nodes}
    return any(node.operator in LAYER_NORMS | {"_fused_rms_norm"} for node in graph.nodes) or _has_root_of_mean(
        nodes, lambda node: node.operator, lambda node: node.inputs, frozenset({"sqrt", "rsqrt"}), ("mean", "var")
    )


def has_layer_norm_in_onnx(model: onnx.ModelProto) -> bool:
    """Whether its ONNX has one."""
    givers = {name: node for node in model.graph.node for name in node.output}
    norms = ("LayerNormalization", "RMSNormalization")
    return any(node.op_type in norms for node in model.graph.node) or _has_root_of_mean(
        givers, lambda node: node.op_type, lambda node: node.input, frozenset({"Sqrt"}), ("ReduceMean",)
    )


def _has_root_of_mean(
    givers: Mapping[str, T],
    kind: Callable[[T], str],
    inputs: Callable[[T], Iterable[str]],
    roots: frozenset[str],
    means: tuple[str, ...],
) -> bool:
    found = [node for node in givers.values() if kind(node) in roots]
    for _ in range(BETWEEN + 1):
        found = [givers[name] for node in found for name in inputs(node) if name in givers]
        if any(kind(node) in means for node in found):
            return True
    return False


def quantised(model: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """The float32 model in the form that the runtime computes in int8, with ranges found on batches of its inputs."""
    from edgeprune import onnx_int8
    from edgeprune.onnx_equivalents import gemms_for_linears, pools_for_means
    from edgeprune.onnx_quantise import ONNXRUNTIME, ONNXRUNTIME_LAYER_NORMS, quantise, quantise_lookups

    if has_layer_norm_in_onnx(model):
        made = quantise(gemms_for_linears(model), calibration, onnx_int8.ONNXRUNTIME, ONNXRUNTIME_LAYER_NORMS)
        return quantise_lookups(made)
    return quantise(pools_for_means(model), calibration, onnx_int8.ONNXRUNTIME, ONNXRUNTIME)
