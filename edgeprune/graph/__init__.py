"""What pruning may do to a model: trace it, prove which dimensions shrink together, find droppable blocks.

A graph is plain data; the functions that make one are imported, and torch with them, when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from edgeprune.graph.structure import Block, Group, Member, ModelGraph, Node, Refusal, Width

if TYPE_CHECKING:
    from edgeprune.graph.analysing import analyse, check_prunable, trace

__all__ = ["Block", "Group", "Member", "ModelGraph", "Node", "Refusal", "Width", "analyse", "check_prunable", "trace"]


if not TYPE_CHECKING:  # mypy knows the names from the import above and reports any other

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'edgeprune.graph' has no attribute '{name}'")
        return getattr(importlib.import_module("edgeprune.graph.analysing"), name)
