"""What a rule gets, and the table that rules are registered in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from edgeprune.graph.atoms import Atoms, no_atoms
from edgeprune.graph.sizes import Expression
from edgeprune.graph.structure import Indices, Refusal

Dims: TypeAlias = tuple[Indices, ...]
Results: TypeAlias = "Dims | list[Dims]"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call: `arguments` by name, with tensors as fx nodes; `dims` of every node seen so far.

    `shapes` are those of the outputs, one unless the operator gives several tensors. `is_data` tells that the result
    depends on the model's inputs, not on parameters alone; `sizes` how the code computed the integers of an argument.
    """

    operator: str
    where: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    tensors: tuple[torch.fx.Node, ...]
    dims: Mapping[torch.fx.Node, Any]
    parameters: Mapping[torch.fx.Node, str]
    atoms: Atoms
    is_data: bool = True
    sizes: Mapping[str, list[Expression]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the (first) output."""
        return self.shapes[0]

    def refusal(self, reason: str) -> Refusal:
        """A refusal at this operator's place."""
        return Refusal(operator=self.operator, where=self.where, reason=reason)

    @property
    def x(self) -> Dims:
        """Dimensions of the first tensor argument."""
        dims: Dims = self.dims[self.tensors[0]]
        return dims

    def of(self, name: str) -> Dims:
        """Dimensions of the tensor argument of that name."""
        dims: Dims = self.dims[self.arguments[name]]
        return dims

    def given(self, name: str) -> bool:
        """Whether the call has a tensor for that argument."""
        return isinstance(self.arguments.get(name), torch.fx.Node)

    def role(self, name: str, dim: int, role: str) -> None:
        """State what a parameter's dimension is to this contraction, if the argument is a parameter."""
        parameter = self.parameters.get(self.arguments[name])
        if parameter is not None:
            self.atoms.roles.setdefault((parameter, dim), role)

    def fix(self, dim: Indices, reason: str) -> None:
        """State that the atoms of a dimension must stay."""
        self.atoms.fix(dim, self.refusal(reason))

    def unite(self, a: Indices, b: Indices, reason: str) -> Indices:
        """Tie two dimensions index by index."""
        return self.atoms.unite(a, b, self.refusal(reason))


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under ATen operator names, separated by blanks."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys((name for group in names for name in group.split()), function))
        return function

    return register


def unknown(call: Call) -> Results:
    """What happens without a rule: whatever the operator touches stays whole."""
    return refuse(call, f"operator '{call.operator}' has no coupling rule")


def refuse(call: Call, reason: str) -> Results:
    """Keep every dimension of every input whole."""
    for tensor in call.tensors:
        for dims in as_outputs(call.dims.get(tensor, ())):
            for dim in dims:
                call.fix(dim, reason)
    return free(call)


def free(call: Call) -> Results:
    """Outputs without atoms."""
    outputs = [tuple(no_atoms(size) for size in shape) for shape in call.shapes]
    return outputs if len(outputs) != 1 else outputs[0]


def as_outputs(dims: Any) -> list[Dims]:
    """The dimensions of a node as a list over its outputs."""
    return dims if isinstance(dims, list) else [dims]
