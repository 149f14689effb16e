"""Where a graph computes attention: as one operator, or spelled out as matmul, softmax, matmul.

Runtimes join what lies between the projections (scaling, bias, softmax, moving the heads), so it is one piece of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from edgeprune.graph.structure import ModelGraph, Node, Width
from edgeprune.kernel_sizes import width_of

FUSED = "scaled_dot_product_attention"
SOFTMAX = frozenset({"softmax", "_softmax"})
MATMULS = frozenset({"matmul", "bmm", "baddbmm"})
LAYOUT = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose movedim contiguous clone alias "
    "select slice unbind chunk split split_with_sizes getitem expand dropout".split()
)
"""Operators that only move heads and tokens about; they belong to the attention when nothing else reads them."""
SCALING = frozenset({"mul", "div"})
BIASING = frozenset({"add", "sub", "masked_fill", "where"})
MADE_HERE = frozenset(
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like rand_like".split()
)
"""Operators that read no more of their input than its shape."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention: `nodes` that it covers, `core` names it (the operator itself, or the softmax).

    `query_width` and `value_width` are of one head; `queries` and `keys` count tokens, `batch` what is left.
    """

    core: str
    nodes: frozenset[str]
    heads: Width
    query_width: Width
    value_width: Width
    num_heads: int
    query_size: int
    value_size: int
    queries: int
    keys: int
    batch: int
    biased: bool


def computed(graph: ModelGraph) -> frozenset[str]:
    """Names of the nodes that depend on the model's inputs; a runtime works out the others when it loads the model."""
    found: set[str] = set()
    for node in graph.nodes:
        reads = node.operator not in MADE_HERE and not found.isdisjoint(node.inputs)
        if node.operator == "placeholder" or reads:
            found.add(node.name)
    return frozenset(found)


def operands(node: Node) -> tuple[str, str]:
    """Names of what a matmul multiplies."""
    first, second = (*node.inputs, *node.inputs)[-2:]
    return first, second


def find_attention(graph: ModelGraph) -> tuple[Attention, ...]:
    """Every attention of a graph, in order."""
    return tuple(_Finder(graph).found())


class _Finder:
    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.computed = computed(graph)
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for source in node.inputs:
                self.users.setdefault(source, []).append(node)

    def found(self) -> Iterator[Attention]:
        for node in self.graph.nodes:
            if node.name not in self.computed:
                continue
            if node.operator == FUSED and len(node.shape) >= 3:
                yield self._fused(node)
            elif node.operator in SOFTMAX and (attention := self._spelled_out(node)) is not None:
                yield attention

    def _fused(self, node: Node) -> Attention:
        query, key = (self.nodes[name] for name in (*node.inputs, *node.inputs)[:2])
        biased = len(node.inputs) > 3 or bool(node.parameters) or bool(node.attributes.get("is_causal"))
        return self._attention(node, [node], query, node, keys=key.shape[-2], biased=biased)

    def _spelled_out(self, softmax: Node) -> Attention | None:
        """Matmul, scaling and bias, softmax, matmul; None where the chain has anything else or another reader."""
        chain = [softmax]
        biased = False
        while chain[0].operator not in MATMULS:
            source = self._only_source(chain[0])
            steps = SCALING | BIASING | LAYOUT | MATMULS
            if source is None or source.operator not in steps or len(self._readers(source)) != 1:
                return None
            biased |= source.operator in BIASING or source.operator == "baddbmm"
            chain.insert(0, source)
        while chain[-1].operator not in MATMULS or chain[-1] is chain[0]:
            readers = self._readers(chain[-1])
            if len(readers) != 1 or readers[0].operator not in LAYOUT | MATMULS:
                return None
            chain.append(readers[0])
        scores, output = chain[0], chain[-1]
        if len(scores.shape) < 3 or not all(self.computed.issuperset(operands(node)) for node in (scores, output)):
            return None
        query = self.nodes[operands(scores)[0]]
        return self._attention(softmax, chain, query, output, keys=scores.shape[-1], biased=biased)

    def _only_source(self, node: Node) -> Node | None:
        sources = [name for name in node.inputs if name in self.computed]
        return self.nodes[sources[0]] if len(sources) == 1 else None

    def _readers(self, node: Node) -> Sequence[Node]:
        return self.users.get(node.name, [])

    def _attention(
        self, core: Node, chain: Sequence[Node], query: Node, output: Node, *, keys: int, biased: bool
    ) -> Attention:
        return Attention(
            core=core.name,
            nodes=self._with_layout(chain),
            heads=width_of(output, -3),
            query_width=width_of(query, -1),
            value_width=width_of(output, -1),
            num_heads=output.shape[-3],
            query_size=query.shape[-1],
            value_size=output.shape[-1],
            queries=output.shape[-2],
            keys=keys,
            batch=prod(output.shape[:-3]),
            biased=biased,
        )

    def _with_layout(self, chain: Sequence[Node]) -> frozenset[str]:
        """The chain, and before and after it all scaling and moving about that serves nothing else."""
        region = {node.name for node in chain}
        for node in reversed(self.graph.nodes):
            readers = self._readers(node)
            serves = bool(readers) and all(reader.name in region for reader in readers)
            if serves and node.name in self.computed and self._moves(node):
                region.add(node.name)
        end = chain[-1]
        while len(readers := self._readers(end)) == 1 and self._moves(readers[0]):
            end = readers[0]
            region.add(end.name)
        return frozenset(region)

    def _moves(self, node: Node) -> bool:
        return node.operator in LAYOUT or (node.operator in SCALING and self._only_source(node) is not None)


def moved(node: Node, source: Node) -> tuple[int, ...] | None:
    """For a permutation: the order in which the source's axes longer than 1 come; None for other operators."""
    rank = len(source.shape)
    order = _order(node.attributes, rank) if node.operator in ("permute", "transpose", "t", "movedim") else None
    return None if order is None else tuple(axis for axis in order if source.shape[axis] > 1)


def _order(attributes: Mapping[str, object], rank: int) -> tuple[int, ...] | None:
    dims = attributes.get("dims")
    if isinstance(dims, (list, tuple)):
        return tuple(int(axis) % rank for axis in dims)
    first, second = attributes.get("dim0", 0), attributes.get("dim1", rank - 1)
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order = list(range(rank))
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return tuple(order)
