"""Zeros in weights, 2:4 or anywhere: which weights stay, how the pattern is held, found again in a file, and chosen."""

from edgeprune.sparsity.holding import baked, check_held, held
from edgeprune.sparsity.sparsifying import CRITERIA, Criterion, LayerSparsity, sparsify

__all__ = ["CRITERIA", "Criterion", "LayerSparsity", "baked", "check_held", "held", "sparsify"]
