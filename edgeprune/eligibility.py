"""Formats of weights; whether a layer can be 2:4, and whether sparse tensor cores can take it: alignment and precision,
with the reason.

Sizes are those of NVIDIA's APEX (`apex/contrib/sparsity/asp.py`): c_out a multiple of 8, c_in a multiple of 16 in half
precision; for int8, of half the bytes, twice as many input channels.
"""

from __future__ import annotations

import re

from edgeprune.kernel import Kernel

DENSE = "dense"
TWO_OF_FOUR = "2:4"
FORMATS = (DENSE, TWO_OF_FOUR)
"""What the solver chooses from; a plan may also say `zeros:0.95`, unstructured: so many zeros or more, anywhere."""
GROUP = 4
"""Consecutive input channels of which two stay."""
C_IN_STEP = {"fp16": 16, "bf16": 16, "int8": 32}
"""Precision that sparse tensor cores compute in, to the multiple of input channels that they take."""
C_OUT_STEP = 8
OPERATORS = ("conv", "linear")


def share_of(form: object) -> float | None:
    """The share of zeros that an unstructured format asks for, above 0 and below 1; None for anything else."""
    found = re.fullmatch(r"zeros:(0\.\d{1,6})", form) if isinstance(form, str) else None
    return float(found[1]) or None if found else None


def is_format(form: object) -> bool:
    """Whether a plan may ask for it."""
    return form in FORMATS or share_of(form) is not None


def refusal(kernel: Kernel) -> str | None:
    """Why a layer of this kernel's shape and precision does not run as 2:4; None where it may."""
    return pattern_refusal(kernel) or core_refusal(kernel)


def pattern_refusal(kernel: Kernel) -> str | None:
    """Why its weights have no 2:4 form, whatever the device."""
    if kernel.operator not in OPERATORS:
        return f"{kernel.operator} has no weights to make 2:4"
    if kernel.groups > 1:
        return f"groups: {kernel.groups} groups of {kernel.c_in // kernel.groups} input channels each, not one of all"
    if kernel.c_in % GROUP:
        return f"alignment: {kernel.c_in} input channels are no multiple of {GROUP}"
    return None


def core_refusal(kernel: Kernel) -> str | None:
    """Why sparse tensor cores don't take it."""
    step = C_IN_STEP.get(kernel.precision)
    if step is None:
        return f"precision: sparse tensor cores compute in {', '.join(C_IN_STEP)}, not {kernel.precision}"
    if kernel.c_in % step:
        return f"alignment: {kernel.c_in} input channels are no multiple of {step} ({kernel.precision})"
    if kernel.c_out % C_OUT_STEP:
        return f"alignment: {kernel.c_out} output channels are no multiple of {C_OUT_STEP}"
    return None
