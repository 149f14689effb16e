"""One call of one operator: which channels go in, which labels come out, what is refused; and how to try it out.

Inputs are written as shapes, a star after each dimension that holds channels: `2 4* 3; 4*`. The starred indices are
numbered from 0 through all inputs. Labels are written a word for each dimension: `.` where no index has a channel,
`0,1,-,3` for single channels (`-`: none), `0+4` where an index lives if both 0 and 4 do; ` | ` between tensors.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.graph import tracing
from edgeprune.graph.atoms import FREE, Atoms, is_free, no_atoms
from edgeprune.graph.coupling import propagate
from edgeprune.graph.program import operator_name
from edgeprune.graph.rules.call import as_outputs
from edgeprune.graph.structure import Indices

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
KINDS: dict[str, Draw] = {
    "float": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "bool": lambda shape, g: torch.randint(0, 2, shape, generator=g, dtype=torch.bool),
    "long": lambda shape, g: torch.randint(0, 2, shape, generator=g),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`meaning`: what a channel's removal leaves unchanged.

    carries: every other index of the result, whatever the removed channel held; sums: those, if it held zeros;
    random: their shape only, which is also what is compared where statistics change.
    """

    name: str
    function: Callable[..., Any]
    inputs: str
    labels: str
    refused: frozenset[str]
    then: str
    meaning: str


def case(
    name: str,
    function: Callable[..., Any],
    inputs: str,
    labels: str,
    *,
    refused: str = "",
    then: str = "",
    meaning: str = "carries",
) -> Case:
    """A case; `refused` are reasons, separated by semicolons, `then` the inputs' labels afterwards."""
    reasons = frozenset(part.strip() for part in refused.split(";") if part.strip())
    return Case(name=name, function=function, inputs=inputs, labels=labels, refused=reasons, then=then, meaning=meaning)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What the rules say of a function: the labels' bookkeeping, dimensions of inputs and outputs, operators met."""

    atoms: Atoms
    inputs: list[list[Indices]]
    outputs: list[list[Indices]]
    operators: frozenset[str]

    @property
    def reasons(self) -> frozenset[str]:
        return frozenset(refusal.reason for refusal in self.atoms.refusals)


class _Net(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def parsed(inputs: str) -> list[tuple[tuple[int, ...], tuple[bool, ...], str]]:
    """Shape, starred dimensions and kind of every input."""
    result = []
    for text in filter(None, inputs.split(";")):
        words = text.split()
        kind = words.pop() if words and words[-1] in KINDS else "float"
        result.append((tuple(int(word.rstrip("*")) for word in words), tuple("*" in word for word in words), kind))
    return result


def all_starred(inputs: str) -> str:
    """The same inputs with channels in every dimension of more than one index."""
    return ";".join(
        " ".join([*(f"{size}*" if size > 1 else str(size) for size in shape), kind])
        for shape, _, kind in parsed(inputs)
    )


def draw(inputs: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [KINDS[kind](shape, generator) for shape, _, kind in parsed(inputs)]


def carried(function: Callable[..., Any], inputs: str) -> Carried:
    """Trace the function and apply the rules to channels where the inputs have stars."""
    program = tracing.trace_program(_Net(function), tuple(draw(inputs, 0)))
    operators = frozenset(operator_name(node) for node in program.graph.nodes if node.op == "call_function")
    assert program.tracer == "recording"
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results = output.all_input_nodes
    for node in results:  # read, but not by an output, which would keep its dimensions
        with program.graph.inserting_before(output):
            program.graph.call_function(torch.ops.aten.alias.default, (node,)).meta = dict(node.meta)
    program.graph.erase_node(output)
    names = {name: f"input {i}" for i, name in enumerate(program.inputs)}
    atoms = Atoms()
    own: list[list[Indices]] = []
    for name, (shape, stars, _) in zip(names.values(), parsed(inputs), strict=True):
        own.append([atoms.new(size) if star else no_atoms(size) for size, star in zip(shape, stars, strict=True)])
        atoms.dims.update({(name, i): dim for i, dim in enumerate(own[-1])})
    dims = propagate(replace(program, parameters=names), atoms)
    return Carried(
        atoms=atoms,
        inputs=own,
        outputs=[list(of_tensor) for node in results for of_tensor in as_outputs(dims[node])],
        operators=operators,
    )


def labels(atoms: Atoms, tensors: list[list[Indices]]) -> str:
    """Labels as they are written in a case."""
    return " | ".join(" ".join(_word(atoms.roots(dim)) for dim in tensor) for tensor in tensors)


def _word(dim: Indices) -> str:
    if is_free(dim):
        return "."
    return ",".join("+".join(str(atom) for atom in column if atom != FREE) or "-" for column in dim.T.tolist())


def check_removal(case: Case, inputs: str, *, seeds: range) -> int:
    """Remove random channels that may go: what is left of the result is the result of what is left of the inputs.

    Gives how often there was something to remove.
    """
    found = carried(case.function, inputs)
    atoms = found.atoms
    dims = [dim for tensor in (*found.inputs, *found.outputs) for dim in tensor]
    roots = np.unique(np.concatenate([atoms.roots(dim).ravel() for dim in dims] or [np.zeros(0, dtype=np.int64)]))
    loose = [root for root in roots.tolist() if root != FREE and atoms.must_stay(root) is None]
    changing = replace(case, meaning="random")
    tried = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dead = [root for root in loose if rng.random() < 0.4]
        alive = [[~np.isin(atoms.roots(dim), dead).any(axis=0) for dim in tensor] for tensor in found.inputs]
        out = [[~np.isin(atoms.roots(dim), dead).any(axis=0) for dim in tensor] for tensor in found.outputs]
        if not dead or not all(index.any() for tensor in (*alive, *out) for index in tensor):
            continue
        tried += 1
        _compare(changing if atoms.statistics else case, inputs, alive, out, seed)
    return tried


def _compare(case: Case, inputs: str, alive: list[list[Any]], out: list[list[Any]], seed: int) -> None:
    whole, other = draw(inputs, seed), draw(inputs, seed + 1000)
    small = [_cut(tensor, indices) for tensor, indices in zip(whole, alive, strict=True)]
    changed = []
    for tensor, garbage, indices in zip(whole, other, alive, strict=True):
        keep = torch.ones(tensor.shape, dtype=torch.bool)
        for i, index in enumerate(indices):
            view = [1] * len(indices)
            view[i] = -1
            keep = keep & torch.from_numpy(index).view(view)
        changed.append(torch.where(keep, tensor, torch.zeros_like(tensor) if case.meaning == "sums" else garbage))
    sizes = [tuple(int(index.sum()) for index in tensor) for tensor in out]
    keywords = {"out": sizes if len(sizes) > 1 else sizes[0]} if _takes_sizes(case.function) else {}
    got, expected = as_list(case.function(*small, **keywords)), as_list(case.function(*changed))
    assert [tuple(tensor.shape) for tensor in got] == sizes
    if case.meaning in ("carries", "sums"):
        for own, dense, indices in zip(got, expected, out, strict=True):
            kept = _cut(dense, indices)
            torch.testing.assert_close(own, kept, rtol=1e-9, atol=1e-9, equal_nan=True)


def _takes_sizes(function: Callable[..., Any]) -> bool:
    try:
        return "out" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _cut(tensor: Tensor, indices: list[Any]) -> Tensor:
    for i, index in enumerate(indices):
        tensor = tensor.index_select(i, torch.from_numpy(np.flatnonzero(index)))
    return tensor


def as_list(value: Any) -> list[Tensor]:
    return list(itertools.chain(value)) if isinstance(value, (tuple, list)) else [value]
