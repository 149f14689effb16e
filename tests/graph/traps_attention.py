"""Traps around attention: heads and widths share a dimension of a weight, so that an index is of two groups at once.

Legend: N batch, T tokens, H heads, D width of a head (of queries and keys), E width of its values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.trap import TOKENS, Answer, random, trap


def layers(heads: int = 3, width: int = 4, values: int = 5, kv_heads: int | None = None, c: int = 8) -> dict[str, Any]:
    """Separate projections of c features, and what an attention module keeps as attributes."""
    kv_heads = kv_heads or heads
    return {
        "num_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width,
        "value_dim": values,
        "scale": width**-0.5,
        "q": nn.Linear(c, heads * width),
        "k": nn.Linear(c, kv_heads * width),
        "v": nn.Linear(c, kv_heads * values),
        "proj": nn.Linear(heads * values, 6),
    }


def projected(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, T, D], keys and values, by the sizes that the module keeps."""
    n, t, _ = x.shape
    q = m.q(x).view(n, t, m.num_heads, m.head_dim).transpose(1, 2)
    k = m.k(x).view(n, t, m.kv_heads, m.head_dim).transpose(1, 2)
    v = m.v(x).view(n, t, m.kv_heads, m.value_dim).transpose(1, 2)
    return q, k, v


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor) -> Tensor:
    """Attention as its formula, [N, T, H E]."""
    attention = ((q @ k.transpose(-2, -1)) * scale).softmax(-1)
    return (attention @ v).transpose(1, 2).flatten(2)


ALL: dict[str, Answer] = {
    "q.weight:0": (3, 4),
    "q.bias:0": (3, 4),
    "k.weight:0": (3, 4),
    "v.weight:0": (3, 5),
    "proj.weight:1": (3, 5),
}
NO_QUERY_WIDTH: dict[str, Answer] = {"q.weight:0": 3, "k.weight:0": 3, "v.weight:0": (3, 5), "proj.weight:1": (3, 5)}
MAYBE_QUERY_WIDTH: dict[str, Answer] = {
    "q.weight:0": [(3,), (3, 4)],
    "k.weight:0": [(3,), (3, 4)],
    "v.weight:0": (3, 5),
    "proj.weight:1": (3, 5),
}


@trap(layers, inputs=TOKENS, groups=ALL)
def eager_attention(m: Any, x: Tensor) -> Any:
    """Values of another width than queries; the scale is an attribute and stays what it was."""
    return m.proj(eager(*projected(m, x), m.scale))


@trap(layers, inputs=TOKENS, groups=ALL)
def sdpa_with_scale(m: Any, x: Tensor) -> Any:
    """The fused operator with the scale given."""
    y = F.scaled_dot_product_attention(*projected(m, x), scale=m.scale)
    return m.proj(y.transpose(1, 2).flatten(2))


@trap(layers, inputs=TOKENS, groups=MAYBE_QUERY_WIDTH)
def sdpa_with_default_scale(m: Any, x: Tensor) -> Any:
    """The operator computes its scale from the width of queries: compensated exactly, or the width stays."""
    y = F.scaled_dot_product_attention(*projected(m, x))
    return m.proj(y.transpose(1, 2).flatten(2))


@trap(layers, inputs=TOKENS, groups=NO_QUERY_WIDTH)
def scale_from_the_shape(m: Any, x: Tensor) -> Any:
    """Python computes the scale from the width of queries."""
    q, k, v = projected(m, x)
    return m.proj(eager(q, k, v, q.shape[-1] ** -0.5))


@trap(layers, inputs=TOKENS, groups=NO_QUERY_WIDTH)
def scale_from_an_attribute(m: Any, x: Tensor) -> Any:
    """Python computes the scale from the attribute that also sizes the view."""
    q, k, v = projected(m, x)
    return m.proj(eager(q, k, v, 1 / m.head_dim**0.5))


@trap(layers, inputs=TOKENS, groups=ALL)
def einsum_attention(m: Any, x: Tensor) -> Any:
    """Both products by einsum, heads never transposed in the code."""
    n, t, _ = x.shape
    q = m.q(x).view(n, t, m.num_heads, -1)
    k = m.k(x).view(n, t, m.num_heads, -1)
    v = m.v(x).view(n, t, m.num_heads, -1)
    attention = (torch.einsum("nihd,njhd->nhij", q, k) * m.scale).softmax(-1)
    return m.proj(torch.einsum("nhij,njhe->nihe", attention, v).reshape(n, t, -1))


@trap(layers, inputs=TOKENS, groups=ALL)
def batched_heads(m: Any, x: Tensor) -> Any:
    """Heads folded into the batch, as for bmm."""
    q, k, v = (y.flatten(0, 1) for y in projected(m, x))
    y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * m.scale).softmax(-1), v)
    return m.proj(y.view(x.shape[0], m.num_heads, *y.shape[1:]).transpose(1, 2).flatten(2))


@trap(
    layers,
    inputs=TOKENS,
    groups={"q.weight:0": 4, "k.weight:0": 4, "v.weight:0": 5, "proj.weight:1": 5},
)
def literal_number_of_heads(m: Any, x: Tensor) -> Any:
    """Three stands in the code: heads stay, their widths may shrink."""
    q, k, v = (y.unflatten(-1, (3, -1)).transpose(1, 2) for y in (m.q(x), m.k(x), m.v(x)))
    return m.proj(eager(q, k, v, m.scale))


@trap(layers, inputs=TOKENS, groups={"q.weight:0": 4, "v.weight:0": 5}, refused="softmax")
def softmax_over_heads(m: Any, x: Tensor) -> Any:
    """Heads are normalised against one another: they stay, their widths may shrink."""
    q, k, v = projected(m, x)
    attention = ((q @ k.transpose(-2, -1)) * m.scale).softmax(1)
    return m.proj((attention @ v).transpose(1, 2).flatten(2))


@trap(layers, inputs=TOKENS, groups={"q.weight:0": 4, "v.weight:0": 5, "proj.weight:1": 5}, refused="mean")
def heads_averaged(m: Any, x: Tensor) -> Any:
    """The output has the mean over heads beside it, as `need_weights` gives."""
    q, k, v = projected(m, x)
    attention = ((q @ k.transpose(-2, -1)) * m.scale).softmax(-1)
    return m.proj((attention @ v).transpose(1, 2).flatten(2)), attention.mean(1)


@trap(
    lambda: {**layers(), "temperature": nn.Parameter(torch.ones(3, 1, 1))},
    inputs=TOKENS,
    groups={**ALL, "temperature:0": 3},
)
def learned_temperature(m: Any, x: Tensor) -> Any:
    """One factor a head, stretched over all pairs of tokens."""
    return m.proj(eager(*projected(m, x), m.temperature))


@trap(
    lambda: {**layers(), "table": nn.Parameter(torch.ones(9, 3)), "index": nn.Buffer(torch.arange(25) % 9)},
    inputs=TOKENS,
    groups={**ALL, "table:1": 3},
)
def relative_position_bias(m: Any, x: Tensor) -> Any:
    """One column of the table a head, read through an index, with heads brought to the front."""
    q, k, v = projected(m, x)
    bias = m.table[m.index].view(5, 5, -1).permute(2, 0, 1).unsqueeze(0)
    attention = ((q @ k.transpose(-2, -1)) * m.scale + bias).softmax(-1)
    return m.proj((attention @ v).transpose(1, 2).flatten(2))


@trap(
    lambda: {**layers(), "q_norm": nn.LayerNorm(4), "k_norm": nn.LayerNorm(4)},
    inputs=TOKENS,
    groups={**ALL, "q_norm.weight:0": 4, "k_norm.bias:0": 4},
)
def normalised_queries(m: Any, x: Tensor) -> Any:
    """A norm over the width of queries, its weight shared by all heads: the width goes, statistics change."""
    q, k, v = projected(m, x)
    return m.proj(eager(m.q_norm(q), m.k_norm(k), v, m.scale))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of pairs (d, d + D / 2)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@trap(
    lambda: {**layers(), "cos": nn.Buffer(random(5, 4)), "sin": nn.Buffer(random(5, 4))},
    inputs=TOKENS,
    groups={
        "q.weight:0": [(2, 3), (3,)],
        "k.weight:0": [(2, 3), (3,)],
        "cos:1": [(2,), ()],
        "v.weight:0": (3, 5),
        "proj.weight:1": (3, 5),
    },
)
def rotary_embedding(m: Any, x: Tensor) -> Any:
    """d and d + D / 2 go together, and the tables follow; or the width stays."""
    q, k, v = projected(m, x)
    return m.proj(eager(rotated(q, m.cos, m.sin), rotated(k, m.cos, m.sin), v, m.scale))


@trap(layers, inputs=TOKENS, groups=NO_QUERY_WIDTH)
def rotary_embedding_computed(m: Any, x: Tensor) -> Any:
    """Frequencies computed from the width in the forward: the width stays."""
    q, k, v = projected(m, x)
    frequencies = 1.0 / 100 ** (torch.arange(0, m.head_dim, 2, dtype=x.dtype) / m.head_dim)
    angles = torch.arange(5, dtype=x.dtype)[:, None] * frequencies.repeat(2)
    return m.proj(eager(rotated(q, angles.cos(), angles.sin()), rotated(k, angles.cos(), angles.sin()), v, m.scale))


@trap(
    lambda: layers(heads=6, kv_heads=3),
    inputs=TOKENS,
    groups={
        "q.weight:0": [(3, 4), (2, 3, 4)],
        "k.weight:0": (3, 4),
        "v.weight:0": (3, 5),
        "proj.weight:1": [(3, 5), (2, 3, 5)],
    },
)
def grouped_queries_repeated(m: Any, x: Tensor) -> Any:
    """Two heads of queries read one of keys and values: they go with it."""
    q, k, v = projected(m, x)
    k, v = (y.repeat_interleave(m.num_heads // m.kv_heads, 1) for y in (k, v))
    return m.proj(eager(q, k, v, m.scale))


@trap(
    lambda: {**layers(heads=6, kv_heads=3), "repeats": 2},
    inputs=TOKENS,
    groups={
        "q.weight:0": [(3, 4), (2, 3, 4)],
        "k.weight:0": (3, 4),
        "v.weight:0": (3, 5),
        "proj.weight:1": [(3, 5), (2, 3, 5)],
    },
)
def grouped_queries_expanded(m: Any, x: Tensor) -> Any:
    """The same by expand and reshape; the number of repeats is an attribute."""
    q, k, v = projected(m, x)

    def repeat(y: Tensor) -> Tensor:
        n, h, t, d = y.shape
        return y[:, :, None].expand(n, h, m.repeats, t, d).reshape(n, h * m.repeats, t, d)

    return m.proj(eager(q, repeat(k), repeat(v), m.scale))


@trap(
    lambda: layers(heads=6, kv_heads=1),
    inputs=TOKENS,
    groups={"q.weight:0": (4, 6), "k.weight:0": 4, "v.weight:0": 5, "proj.weight:1": (5, 6)},
)
def multi_query(m: Any, x: Tensor) -> Any:
    """All heads read one key and value, broadcast: they go one by one."""
    return m.proj(eager(*projected(m, x), m.scale))


class Packed(nn.Module):
    """What the packed attentions have in common: one linear gives queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 3, 4, 0.5
        self.qkv = nn.Linear(8, 36)
        self.proj = nn.Linear(12, 6)


@trap(inputs=TOKENS, groups={"qkv.weight:0": [(3,), (3, 4)], "proj.weight:1": [(3,), (3, 4)]})
class PackedByReshape(Packed):
    """One width for queries, keys and values, since one view has them all; the operator's scale reads it."""

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


@trap(inputs=TOKENS, groups={"qkv.weight:0": (3, 4), "qkv.bias:0": (3, 4), "proj.weight:1": (3, 4)})
class PackedByReshapeWithScale(Packed):
    """The scale is an attribute: the width that queries, keys and values share may shrink."""

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(eager(q, k, v, self.scale))


@trap(inputs=TOKENS, groups={"qkv.weight:0": (3, 4), "proj.weight:1": (3, 4)})
class PackedByChunk(Packed):
    """Thirds of equal size: what queries lose, keys and values lose."""

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.proj(eager(q, k, v, self.scale))


@trap(inputs=TOKENS, groups={"qkv.weight:0": (3, 4), "proj.weight:1": (3, 4)})
class PackedHeadsFirst(Packed):
    """Each head has its queries, keys and values side by side: (H, 3 D), then thirds."""

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, self.num_heads, -1).transpose(1, 2).chunk(3, -1)
        return self.proj(eager(q, k, v, self.scale))


@trap(inputs=TOKENS, groups={"qkv.weight:0": (), "proj.weight:1": (), "proj.weight:0": 5})
class WidthFromTheInput(nn.Module):
    """`head_dim` is C // H of the input, as in early vision transformers: with fewer heads it would be another."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        return self.head(self.proj(x).relu())


@trap(
    lambda: {
        "attention": nn.MultiheadAttention(8, 2, batch_first=True),
        "up": nn.Linear(8, 12),
        "head": nn.Linear(12, 2),
    },
    inputs=TOKENS,
    groups={"up.weight:0": 12},
)
def torch_attention(m: Any, x: Tensor) -> Any:
    """Packed weights in one parameter, the width of a head from the width of the input."""
    return m.head(m.up(m.attention(x, x, x, need_weights=False)[0]).relu())


@trap(
    lambda: {**layers(), "memory": nn.Linear(7, 10), "k": nn.Linear(10, 12), "v": nn.Linear(10, 15)},
    inputs=(*TOKENS, random(2, 6, 7)),
    groups={**ALL, "memory.weight:0": 10, "k.weight:1": 10, "v.weight:1": 10},
)
def cross_attention(m: Any, x: Tensor, memory: Tensor) -> Any:
    """Keys and values come from a second input with other tokens and another width."""
    memory = m.memory(memory)
    n, t, s = *x.shape[:2], memory.shape[1]
    q = m.q(x).view(n, t, m.num_heads, -1).transpose(1, 2)
    k = m.k(memory).view(n, s, m.num_heads, -1).transpose(1, 2)
    v = m.v(memory).view(n, s, m.num_heads, -1).transpose(1, 2)
    return m.proj(eager(q, k, v, m.scale))


@trap(
    lambda: {
        **layers(),
        "embed": nn.Linear(8, 10),
        "norms": nn.ModuleList([nn.LayerNorm(10), nn.LayerNorm(10), nn.LayerNorm(10)]),
        **{name: nn.Linear(10, width) for name, width in (("q", 12), ("k", 12), ("v", 15), ("up", 14))},
        "proj": nn.Linear(15, 10),
        "down": nn.Linear(14, 10),
        "head": nn.Linear(10, 2),
    },
    inputs=TOKENS,
    groups={
        **ALL,
        "embed.weight:0": 10,
        "norms.0.weight:0": 10,
        "q.weight:1": 10,
        "proj.weight:0": 10,
        "down.weight:0": 10,
        "up.weight:0": 14,
        "down.weight:1": 14,
    },
)
def transformer_layer(m: Any, x: Tensor) -> Any:
    """An attention branch and an MLP branch on one residual stream, and the layer of both is a branch too."""
    x = m.embed(x)
    x = x + m.proj(eager(*projected(m, m.norms[0](x)), m.scale))
    x = x + m.down(F.gelu(m.up(m.norms[1](x))))
    return m.head(m.norms[2](x))


@trap(
    lambda: (
        {"a": nn.Linear(8, 6), "up": nn.Linear(6, 12), "gate": nn.Linear(6, 12), "down": nn.Linear(12, 6)}
        | {"head": nn.Linear(6, 2)}
    ),
    inputs=TOKENS,
    groups={"a.weight:0": 6, "up.weight:0": 12, "gate.weight:0": 12, "down.weight:1": 12, "down.weight:0": 6},
)
def gated_mlp(m: Any, x: Tensor) -> Any:
    """SwiGLU: both halves of the hidden width are linears of their own."""
    x = m.a(x)
    return m.head(x + m.down(F.silu(m.gate(x)) * m.up(x)))


@trap(
    lambda: {"a": nn.Linear(8, 6), "up": nn.Linear(6, 24), "down": nn.Linear(12, 6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "up.weight:0": 12, "down.weight:1": 12, "down.weight:0": 6},
)
def gated_mlp_packed(m: Any, x: Tensor) -> Any:
    """SwiGLU with one linear, cut in halves."""
    x = m.a(x)
    value, gate = m.up(x).chunk(2, -1)
    return m.head(x + m.down(value * F.gelu(gate, approximate="tanh")))
