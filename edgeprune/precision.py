"""Precisions: the one place that says which kernels of a network are in one, and whether a kernel ran in it.

A network "in int8" is in int8 where its runtime has such kernels, and in fp32 where it has none: each backend lists in
`COMPUTES` what it computes in which precision, found by its own listing of what it executed (`docs/precisions.md`). A
kernel that was asked for in one precision and ran in another is no measurement: `refusal` says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.kernel import OPERATORS, Kernel
from edgeprune.measurement import NodeTimes

Computes = Mapping[str, frozenset[str]]
"""Precision to the kinds of kernels (`kind_of`) that a runtime computes in it."""

ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu")
KINDS = frozenset({*OPERATORS, *(f"activation {name}" for name in ACTIVATIONS)} - {"activation"})
"""All of them."""
LEAST_SHARE = 0.5
"""Of a kernel's compute time that must be in its precision; layout changes and copies may run as what they like."""


def kind_of(operator: str, epilogue: tuple[str, ...]) -> str:
    """The operator; of an activation with its name: `activation silu`."""
    return f"{operator} {epilogue[0]}" if operator == "activation" and epilogue else operator


def precision_of(operator: str, epilogue: tuple[str, ...], wanted: str, computes: Computes) -> str:
    """Of a kernel in a network in `wanted`: fp32 where the runtime has no such kernel in it."""
    return wanted if kind_of(operator, epilogue) in computes.get(wanted, ()) else "fp32"


def check_computes(kernel: Kernel, computes: Computes, runtime: str) -> None:
    """`ValueError` that says why, where the runtime has no such kernel in the kernel's precision."""
    kind = kind_of(kernel.operator, kernel.epilogue)
    if kernel.precision not in computes:
        raise ValueError(
            f"{kernel.key}: {kernel.precision} {kernel.sparsity} kernels are not built yet for {runtime} "
            f"(supported: {', '.join(computes)})"
        )
    if kind in KINDS and kind not in computes[kernel.precision]:
        raise ValueError(f"{kernel.key}: {runtime} computes no {kind} in {kernel.precision}, it would run in fp32")


def shares_of(nodes: NodeTimes | None) -> dict[str, float] | None:
    """Share of the compute time in each precision, the largest first; None where the runtime doesn't tell of all."""
    compute = [node for node in nodes.nodes if node["compute"]] if nodes else []
    total = sum(float(node["time_us"]) for node in compute)
    if not total or not all(node.get("precision") for node in compute):
        return None
    found: dict[str, float] = {}
    for node in compute:
        found[node["precision"]] = found.get(node["precision"], 0.0) + float(node["time_us"]) / total
    return {name: round(share, 4) for name, share in sorted(found.items(), key=lambda item: -item[1])}


def refusal(kernel: Kernel, shares: Mapping[str, float] | None) -> str | None:
    """Why what was timed is not this kernel: less than half of its compute time was in its precision.

    None where it was, and where the runtime doesn't tell.
    """
    if not shares or shares.get(kernel.precision, 0.0) >= LEAST_SHARE:
        return None
    told = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    return f"the runtime did not compute it in {kernel.precision}: {told}"
