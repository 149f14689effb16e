"""Small networks on which pruners go wrong, each with the answer worked out by hand: `TRAPS`, by name."""

from __future__ import annotations

from tests.graph import traps_attention, traps_convolution, traps_shape, traps_structure
from tests.graph.trap import TRAPS, Trap

__all__ = ["TRAPS", "Trap"]

FILES = (traps_convolution, traps_shape, traps_attention, traps_structure)
