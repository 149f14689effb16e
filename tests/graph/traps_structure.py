"""Traps around the whole model: shared weights, several inputs and outputs, constants, recurrence, experts, control."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.trap import IMAGE, TOKENS, WORDS, conv, random, trap


@trap(
    lambda: {"a": nn.Linear(8, 6), "same": nn.Linear(6, 6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "same.weight:0": 6, "same.weight:1": 6},
)
def layer_used_twice(m: Any, x: Tensor) -> Any:
    """The output of a layer is its own input: one width."""
    return m.head(m.same(m.same(m.a(x)).relu()))


@trap(
    lambda: {"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "same": nn.Linear(6, 5), "head": nn.Linear(10, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "b.weight:0": 6, "same.weight:1": 6, "same.weight:0": 5, "head.weight:1": 5},
)
def layer_on_two_branches(m: Any, x: Tensor) -> Any:
    """The shared layer ties what it reads; its output stands twice in the cat."""
    return m.head(torch.cat([m.same(m.a(x)), m.same(m.b(x))], -1))


@trap(inputs=WORDS, groups={"embed.weight:1": 8, "up.weight:0": 12, "up.weight:1": 8, "down.weight:0": 8})
class TiedDecoder(nn.Module):
    """The decoder's weight is the embedding's: its inputs go with the residual stream, its outputs are words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.decoder = nn.Linear(8, 7, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, words: Tensor) -> Any:
        x = self.embed(words)
        return self.decoder(x + self.down(self.up(x).relu()))


@trap(inputs=WORDS, groups={"b.weight:0": 5, "a.weight:0": 6, "embed.weight:1": 8, "b.weight:1": 8})
class TiedTransposed(nn.Module):
    """A weight is read as it is and transposed, as in a tied auto-encoder; the code behind is 6 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.a = nn.Linear(8, 6)
        self.b, self.head = nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Any:
        code = self.a(self.embed(words)).relu()
        return self.head(self.b(code @ self.a.weight).relu())


@trap(
    lambda: {
        "embed": nn.Embedding(7, 8),
        "positions": nn.Embedding(5, 8),
        "ids": nn.Buffer(torch.arange(5)),
        "head": nn.Linear(8, 2),
    },
    inputs=WORDS,
    groups={"embed.weight:1": 8, "positions.weight:1": 8, "head.weight:1": 8},
)
def embeddings(m: Any, words: Tensor) -> Any:
    """Words and positions are rows, which stay; features are pruned in both."""
    return m.head(m.embed(words) + m.positions(m.ids))


@trap(
    lambda: {"a": conv(3, 6), "b": nn.Linear(8, 6), "head": conv(6, 2)},
    inputs=(*IMAGE, random(2, 8)),
    groups={"a.weight:0": 6, "b.weight:0": 6},
)
def two_inputs(m: Any, x: Tensor, condition: Tensor) -> Any:
    """A vector scales the channels of a picture."""
    return m.head(m.a(x) * m.b(condition)[:, :, None, None])


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 5), "head": conv(6, 2), "end": nn.Linear(5, 3)},
    groups={"a.weight:0": 6, "b.weight:0": 5, "head.weight:1": 6},
)
def two_outputs(m: Any, x: Tensor) -> Any:
    """One output early, one late."""
    x = m.a(x)
    return m.head(x), m.end(m.b(x.relu()).mean((2, 3)))


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 5), "head": conv(5, 2)},
    groups={"b.weight:0": 5, "a.weight:0": ()},
    refused="output",
)
def features_are_an_output(m: Any, x: Tensor) -> Any:
    """What the model also returns keeps its width."""
    x = m.a(x)
    return {"logits": m.head(m.b(x).relu()), "features": x}


@trap(
    lambda: {"a": conv(3, 6), "head": conv(6, 2), "aux": conv(6, 3)},
    groups={"a.weight:0": 6, "aux.weight:1": 6},
)
def dictionary_of_outputs(m: Any, x: Tensor) -> Any:
    """Outputs by name, one of them a list."""
    x = m.a(x).relu()
    return {"out": m.head(x), "more": [m.aux(x)]}


@trap(
    lambda: {"a": conv(3, 6), "means": [random(6, 1, 1)], "head": conv(6, 2)},
    refused="constant",
)
def plain_constant(m: Any, x: Tensor) -> Any:
    """A tensor with one value a channel that is neither parameter nor buffer."""
    return m.head(m.a(x) - m.means[0])


@trap(
    lambda: {"a": conv(3, 6), "means": nn.Buffer(random(6, 1, 1)), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "means:0": 6},
)
def buffer_constant(m: Any, x: Tensor) -> Any:
    """The same as a buffer."""
    return m.head(m.a(x) - m.means)


@trap(
    lambda: {"a": conv(3, 6), "means": nn.Buffer(random(6, 1, 1), persistent=False), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "means:0": 6},
)
def hidden_buffer(m: Any, x: Tensor) -> Any:
    """A buffer that the state does not hold."""
    return m.head(m.a(x) - m.means)


@trap(lambda: {"a": conv(3, 6), "head": conv(6, 2)}, groups={"a.weight:0": [(6,), ()], "a.bias:0": [(6,), ()]})
def constant_made_from_the_size(m: Any, x: Tensor) -> Any:
    """Ones of the width of the day: equal whatever is removed."""
    x = m.a(x)
    return m.head(x + torch.ones(x.shape[1], 1, 1, dtype=x.dtype))


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 5), "head": conv(5, 2)},
    groups={"b.weight:0": 5, "a.weight:0": ()},
)
def ramp_made_from_the_size(m: Any, x: Tensor) -> Any:
    """A ramp over channels: a shorter one has other values."""
    x = m.a(x)
    return m.head(m.b(x + torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]).relu())


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 5), "head": conv(5, 2)},
    groups={"b.weight:0": 5, "a.weight:0": ()},
)
def divided_by_the_width(m: Any, x: Tensor) -> Any:
    """A number that Python computes from the number of channels."""
    x = m.a(x)
    return m.head(m.b(x / x.shape[1] ** 0.5).relu())


@trap(
    lambda: {
        "embed": nn.Linear(8, 6),
        "gamma": nn.Parameter(torch.ones(6)),
        "up": nn.Linear(6, 10),
        "down": nn.Linear(10, 6),
        "head": nn.Linear(6, 2),
    },
    inputs=TOKENS,
    groups={"embed.weight:0": 6, "gamma:0": 6, "up.weight:0": 10, "down.weight:1": 10},
)
def layer_scale(m: Any, x: Tensor) -> Any:
    """A branch scaled channel by channel, the parameter a vector without batch."""
    x = m.embed(x)
    return m.head(x + m.gamma * m.down(m.up(x).relu()))


@trap(
    lambda: {
        "patch": nn.Conv2d(3, 8, 2, 2),
        "cls": nn.Parameter(torch.ones(1, 1, 8)),
        "positions": nn.Parameter(torch.ones(1, 5, 8)),
        "head": nn.Linear(8, 2),
    },
    groups={"patch.weight:0": 8, "cls:2": 8, "positions:2": 8, "head.weight:1": 8},
)
def class_token(m: Any, x: Tensor) -> Any:
    """Tokens of a picture, one more in front, positions added, the first one read."""
    x = m.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.positions
    return m.head(x[:, 0])


@trap(
    lambda: {
        "a": nn.Linear(8, 6),
        "lstm": nn.LSTM(6, 5, batch_first=True),
        "up": nn.Linear(5, 12),
        "head": nn.Linear(12, 2),
    },
    inputs=TOKENS,
    groups={"up.weight:0": 12, "a.weight:0": (), "up.weight:1": ()},
    refused="lstm",
)
def lstm(m: Any, x: Tensor) -> Any:
    """A recurrent layer, opaque: its input and its state stay whole, the rest does not care."""
    return m.head(m.up(m.lstm(m.a(x))[0]).relu())


@trap(
    lambda: {
        "a": nn.Linear(8, 6),
        "gru": nn.GRU(6, 5, batch_first=True),
        "up": nn.Linear(5, 12),
        "head": nn.Linear(12, 2),
    },
    inputs=TOKENS,
    groups={"up.weight:0": 12, "a.weight:0": (), "up.weight:1": ()},
    refused="gru",
)
def gru(m: Any, x: Tensor) -> Any:
    """The same with another cell."""
    return m.head(m.up(m.gru(m.a(x))[0]).relu())


@trap(lambda: {"a": nn.Linear(8, 6), "head": nn.Linear(6, 2)}, inputs=TOKENS, refused="trace")
def control_by_data(m: Any, x: Tensor) -> Any:
    """Which way it goes depends on values."""
    x = m.a(x)
    return m.head(x if x.sum() > 0 else x.relu())


@trap(
    lambda: {"a": nn.Linear(8, 6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "head.weight:1": 6},
)
def control_by_sizes(m: Any, x: Tensor) -> Any:
    """Which way it goes depends on the number of tokens, which pruning leaves."""
    return m.head(m.a(x).relu() if x.shape[1] > 3 else m.a(x))


@trap(
    lambda: {"a": nn.Linear(8, 6), "b": nn.Linear(6, 5), "head": nn.Linear(5, 2)},
    inputs=TOKENS,
    groups={"b.weight:0": 5, "a.weight:0": ()},
)
def control_by_width(m: Any, x: Tensor) -> Any:
    """Which way it goes depends on the number of channels: narrower, it would leave out the ReLU."""
    x = m.a(x)
    return m.head(m.b(x.relu() if x.shape[-1] > 5 else x).relu())


@trap(
    lambda: {
        "embed": nn.Linear(8, 7),
        "gate": nn.Linear(7, 3),
        "experts": nn.ModuleList(nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 5)) for _ in range(3)),
        "head": nn.Linear(5, 2),
    },
    inputs=TOKENS,
    groups={
        "embed.weight:0": 7,
        "gate.weight:1": 7,
        "gate.weight:0": (),
        "experts.0.0.weight:0": 6,
        "experts.1.0.weight:0": 6,
        "experts.0.2.weight:0": 5,
        "experts.2.2.weight:0": 5,
    },
    refused="softmax",
)
def mixture_of_experts(m: Any, x: Tensor) -> Any:
    """Every expert has a hidden width of its own; their number stays, the softmax runs over it."""
    x = m.embed(x)
    outputs = torch.stack([expert(x) for expert in m.experts], -1)
    return m.head((outputs * m.gate(x).softmax(-1).unsqueeze(-2)).sum(-1))


@trap(
    lambda: {
        "a": nn.Linear(8, 6),
        "up": nn.Parameter(random(3, 6, 7)),
        "down": nn.Parameter(random(3, 7, 5)),
        "head": nn.Linear(15, 2),
    },
    inputs=TOKENS,
    groups={"a.weight:0": 6, "up:1": 6, "up:2": 7, "down:1": 7, "down:2": 5},
)
def stacked_experts(m: Any, x: Tensor) -> Any:
    """Weights of all experts in one parameter: one hidden width for all of them, written as matmul."""
    hidden = m.a(x).unsqueeze(1) @ m.up
    return m.head((hidden.relu() @ m.down).transpose(1, 2).flatten(2))


@trap(
    lambda: {
        "stem": conv(3, 6),
        "a": nn.ModuleList([conv(6, 8), conv(6, 9)]),
        "b": nn.ModuleList([conv(8, 6), conv(9, 6)]),
        "c": nn.ModuleList([conv(6, 6), conv(6, 6)]),
        "head": conv(6, 2),
    },
    groups={"stem.weight:0": 6, "a.0.weight:0": 8, "a.1.weight:0": 9, "b.0.weight:0": 6, "c.1.weight:1": 6},
)
def nested_residuals(m: Any, x: Tensor) -> Any:
    """A residual branch made of residual blocks."""
    x = m.stem(x)
    y = x
    for a, b, c in zip(m.a, m.b, m.c, strict=True):
        y = y + b(a(y).relu())
        y = c(y.relu())
    return m.head(x + y)


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 6), "alpha": nn.Parameter(torch.ones(1)), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "b.weight:0": 6, "b.weight:1": 6},
)
def scalar_parameter(m: Any, x: Tensor) -> Any:
    """A factor for all channels: a parameter of one value that never shrinks."""
    x = m.a(x)
    return m.head(x + m.alpha * F.leaky_relu(m.b(x)))


@trap(
    lambda: {"a": conv(3, 6), "prelu": nn.PReLU(6), "head": conv(6, 2)}, groups={"a.weight:0": 6, "prelu.weight:0": 6}
)
def activation_with_weights(m: Any, x: Tensor) -> Any:
    """A slope for every channel."""
    return m.head(m.prelu(m.a(x)))


@trap(
    lambda: {"a": conv(3, 6), "b": conv(6, 6), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "b.weight:0": 6},
)
def chosen_by_a_mask(m: Any, x: Tensor) -> Any:
    """`where` picks between two tensors by a third, all of the same channels."""
    x = m.a(x)
    return m.head(torch.where(x > 0, x, m.b(x)))


@trap(
    lambda: {"a": nn.Linear(8, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "norm.running_mean:0": 6},
)
def batch_norm_over_tokens(m: Any, x: Tensor) -> Any:
    """Features brought to the front for the norm and back."""
    return m.head(m.norm(m.a(x).transpose(1, 2)).transpose(1, 2).relu())


@trap(
    lambda: {"mix": nn.Linear(5, 7), "back": nn.Linear(7, 5), "a": nn.Linear(8, 6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "mix.weight:0": 7, "back.weight:1": 7, "mix.weight:1": (), "back.weight:0": ()},
)
def token_mixing(m: Any, x: Tensor) -> Any:
    """An MLP over tokens, then one over features: the residual is 8 wide and 5 long, both of the input."""
    x = x + m.back(m.mix(x.transpose(1, 2)).relu()).transpose(1, 2)
    return m.head(m.a(x).relu())
