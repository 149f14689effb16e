"""2:4 sparsity: which weights stay, how the pattern is held, found again in a file, and chosen where it is faster."""

from edgeprune.sparsity.holding import baked, check_held, held
from edgeprune.sparsity.sparsifying import CRITERIA, Criterion, LayerSparsity, sparsify

__all__ = ["CRITERIA", "Criterion", "LayerSparsity", "baked", "check_held", "held", "sparsify"]
