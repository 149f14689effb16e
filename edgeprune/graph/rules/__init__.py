"""How each ATen operator carries channels from its inputs to its output: one function a rule, one table.

A rule gets the call and returns, for every dimension of the output, which atoms each index comes from (for operators
with several outputs, a list of that). What it can't prove it fixes, with the reason. Adding an operator is adding one
function under its ATen name.
"""

from edgeprune.graph.rules import attention, contractions, elementwise, indexing, norms, reductions, shapes, windows
from edgeprune.graph.rules.call import RULES, Call, Dims, unknown

__all__ = [
    "RULES",
    "Call",
    "Dims",
    "attention",
    "contractions",
    "elementwise",
    "indexing",
    "norms",
    "reductions",
    "shapes",
    "unknown",
    "windows",
]  # fmt: skip
