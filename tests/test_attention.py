"""Attention is found whether it is one operator or spelled out, with all that only moves its heads about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeprune.attention import Attention, computed, find_attention
from edgeprune.graph import ModelGraph, analyse, tracing

pytestmark = pytest.mark.unit


def graph_of(model: nn.Module, *shape: int) -> ModelGraph:
    return analyse(tracing.trace_program(model, (torch.zeros(*shape),)))


def covered(graph: ModelGraph, found: Attention) -> list[str]:
    return [node.operator for node in graph.nodes if node.name in found.nodes]


class OneOperator(nn.Module):
    """Three heads of 8, queries, keys and values in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class SpelledOut(nn.Module):
    """Two heads of 8 for queries and keys, of 4 for values; a learned bias on the scores, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.bias = nn.Parameter(torch.randn(2, 81))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + self.bias.view(2, 9, 9).unsqueeze(0)
        result: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 9, 8))
        return result


def test_one_operator() -> None:
    graph = graph_of(OneOperator(), 2, 7, 24)
    (found,) = find_attention(graph)
    assert (found.num_heads, found.query_size, found.value_size) == (3, 8, 8)
    assert (found.batch, found.queries, found.keys, found.biased) == (2, 7, 7, False)
    rest = [n.operator for n in graph.nodes if n.name not in found.nodes]
    assert rest == ["placeholder", "linear", "linear", "output"]


def test_spelled_out() -> None:
    graph = graph_of(SpelledOut(), 5, 9, 16)
    (found,) = find_attention(graph)
    assert (found.core, found.biased) == ("softmax", True)
    assert (found.num_heads, found.query_size, found.value_size) == (2, 8, 4)
    assert (found.batch, found.queries, found.keys) == (5, 9, 9)
    assert sorted({"matmul", "add", "mul", "softmax"} - set(covered(graph, found))) == []
    rest = [n.operator for n in graph.nodes if n.name not in found.nodes and n.name in computed(graph)]
    assert rest == ["placeholder", "linear", "linear", "linear", "linear", "output"]


def test_a_causal_mask_is_a_bias() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    (found,) = find_attention(graph_of(Causal(), 1, 2, 5, 4))
    assert found.biased


def test_what_something_else_reads_is_not_covered() -> None:
    class Shared(OneOperator):
        def forward(self, x: Tensor) -> Tensor:
            heads = self.qkv(x).unflatten(-1, (9, 8)).transpose(1, 2)
            q, k, v = heads.chunk(3, 1)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            result: Tensor = self.out(y.transpose(1, 2).flatten(2)) + heads.mean()
            return result

    graph = graph_of(Shared(), 2, 7, 24)
    (found,) = find_attention(graph)
    assert covered(graph, found).count("transpose") == 1, "only the one that joins the heads"


def test_a_softmax_that_is_no_attention() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.f(x).softmax(-1)
            return result

    assert find_attention(graph_of(Classifier(), 2, 4)) == ()


def test_what_does_not_depend_on_the_input_is_not_computed() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.new_zeros(3, 4).fill_(2.0)

    graph = graph_of(Masked(), 3, 4)
    assert [n.operator for n in graph.nodes if n.name in computed(graph)] == ["placeholder", "add", "output"]
