"""Linears whose weights are nearly all zeros, stored without them: LiteRT multiplies such rows by a kernel of its own.

The format is that of `SparsityParameters` in the schema: dimensions in their order, all dense but the last one, of
which the places that are not zero are listed row by row (segments, indices). Nothing else of LiteRT multiplies sparsely
on x86: XNNPACK's sparse convolutions are switched off on CPUs with AVX, and LiteRT has none of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.backends.tflite.flatbuffer import WEIGHTED, constant, dtype, kind, text
from edgeprune.errors import InputError

Array = npt.NDArray[Any]

LEAST = 0.95
"""Share of zeros from which that kernel was faster than XNNPACK's dense one in all sizes (docs/sparsity.md)."""
MOST_ROWS = 1
"""The kernel multiplies one row after another, so with more of them it soon is the slower one."""
NAMED = 8
"""How many layers a refusal names."""


def store_sparse(model: Any, *, least: float = LEAST, most_rows: int = MOST_ROWS) -> str:
    """Store the weight of every linear sparse that has so many zeros, in place; gives which, with their zeros.

    `InputError` where it is nowhere, with the reason for each layer: the kernel takes one row at a time, so it is for
    linears that see one row alone. `declare` has to follow: by version 8 of the operator, and by nothing else, XNNPACK
    knows that the weight is not for it; it would read what is stored as if it were dense.
    """
    graph = model.subgraphs[0]
    stored, refused = list[str](), list[str]()
    for operator in graph.operators:
        if kind(model, operator) not in WEIGHTED:
            continue
        index = int(operator.inputs[1])
        weight = graph.tensors[index]
        if why := _refusal(model, operator, least, most_rows):
            refused.append(f"{text(weight.name)}: {why}")
            continue
        values = constant(model, index, np.float32).reshape(weight.shape)
        weight.sparsity, kept = sparsity_of(values)
        model.buffers[weight.buffer].data = np.frombuffer(kept.tobytes(), np.uint8)
        stored.append(f"{text(weight.name)} ({(values == 0).mean():.1%} zeros)")
    if not stored:
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        told = "; ".join(refused[:NAMED]) or "it has no layers with weights"
        raise InputError(f"no layer is faster with sparse weights: {told}{more}")
    return ", ".join(stored)


def _refusal(model: Any, operator: Any, least: float, most_rows: int) -> str | None:
    """Why the weight of a contraction stays dense."""
    graph, name, index = model.subgraphs[0], kind(model, operator), int(operator.inputs[1])
    weight = graph.tensors[index]
    if name != "FULLY_CONNECTED":
        return f"{name} runs densely whatever its zeros"
    values = constant(model, index, np.float32)
    if dtype(weight) != "float32" or not values.size or weight.sparsity is not None:
        return "its weight is no dense float32 constant"
    rows = int(np.prod(graph.tensors[int(operator.outputs[0])].shape)) // int(weight.shape[0])
    if rows > most_rows:
        return f"{rows} rows go through it, the sparse kernel is for one"
    if sum(list(other.inputs).count(index) for other in graph.operators) > 1:
        return "its weight is read twice"
    zeros = float((values == 0).mean())
    if zeros < least:
        return f"{zeros:.1%} zeros, at least {least:.0%} are needed"
    return None if zeros < 1 else "it is all zeros"


def sparsity_of(values: Array) -> tuple[Any, Array]:
    """`SparsityParametersT` of an array [..., n], whose last dimension is compressed, and the values that stay."""
    from ai_edge_litert import schema_py_generated as schema

    rows = values.reshape(-1, values.shape[-1])
    there = rows != 0
    made = schema.SparsityParametersT()
    made.traversalOrder = list(range(values.ndim))
    made.dimMetadata = [_dense(size) for size in values.shape[:-1]]
    last = schema.DimensionMetadataT()
    last.format = schema.DimensionType.SPARSE_CSR
    last.arraySegmentsType, last.arraySegments = _integers(np.concatenate([[0], np.cumsum(there.sum(axis=1))]))
    last.arrayIndicesType, last.arrayIndices = _integers(np.nonzero(there)[1])
    made.dimMetadata.append(last)
    return made, rows[there]


def _dense(size: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.DimensionMetadataT()
    made.format, made.denseSize = schema.DimensionType.DENSE, size
    return made


def _integers(values: Array) -> tuple[int, Any]:
    """In the fewest bytes that the format has for them."""
    from ai_edge_litert import schema_py_generated as schema

    largest = int(values.max(initial=0))
    bits = 8 if largest < 1 << 8 else 16 if largest < 1 << 16 else 32
    name = {8: "Uint8Vector", 16: "Uint16Vector", 32: "Int32Vector"}[bits]
    made = getattr(schema, f"{name}T")()
    made.values = values.astype(np.int32 if bits == 32 else f"uint{bits}")
    return getattr(schema.SparseIndexVector, name), made
