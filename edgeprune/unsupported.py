"""An operator that a format or runtime can't take: which one, where in the model, and what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgeprune.errors import EdgepruneError
from edgeprune.graph.program import module_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|torch\.ops\.\w+)[.:]+(\w+)")


def unsupported(program: ExportedProgram, error: BaseException | str, taker: str) -> EdgepruneError | None:
    """The error for a converter's refusal, if that names an operator; None where it is about anything else.

    Converters name operators of the program that they made of ours by decomposing it: `_linalg_svd` for `linalg_svd`,
    `linalg_eig` for `linalg_eigvals`.
    """
    text = error if isinstance(error, str) else "\n".join(_chain(error))
    found = _OPERATOR.search(text)
    if found is None:
        return None
    places = [place_of(node) for node in program.graph.nodes if _matches(node, found[1])]
    where = ", ".join(dict.fromkeys(place for place in places if place)) or "a place that it does not name"
    return EdgepruneError(
        f"{taker} has no counterpart of torch's operator '{found[0].rpartition('torch.ops.')[2]}', which is called in "
        f"{where}: replace it in the model, or leave that part out of what is exported and run it after the engine"
    )


def place_of(node: Node) -> str:
    """`body.mix (Svd)`: the innermost module that calls it; the model's class alone for its own forward."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = module_name(node), list(stack.values())[-1][1]
    name = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return f"{path} ({name})" if path else str(name)


def _matches(node: Node, operator: str) -> bool:
    if node.op != "call_function":
        return False
    name, operator = str(getattr(node.target, "_opname", node.target)).strip("_"), operator.strip("_")
    return name.startswith(operator) or name.endswith(f"_{operator}")


def _chain(error: BaseException | None) -> list[str]:
    """What every cause says, the first cause first."""
    told = []
    while error is not None:
        told.append(str(error))
        error = error.__cause__
    return told[::-1]
