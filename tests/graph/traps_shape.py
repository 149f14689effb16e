"""Traps around operators that move, cut, repeat or reduce channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.trap import IMAGE, TOKENS, conv, random, trap


@trap(
    lambda: {"a": conv(3, 4), "b": conv(3, 6), "c": conv(3, 5), "head": conv(15, 2)},
    groups={"a.weight:0": 4, "b.weight:0": 6, "c.weight:0": 5, "head.weight:1": (4, 5, 6)},
)
def cascaded_cat(m: Any, x: Tensor) -> Any:
    """A cat of a cat: offsets add up."""
    return m.head(torch.cat([torch.cat([m.a(x), m.b(x)], 1), m.c(x)], 1))


@trap(
    lambda: {"a": conv(3, 4), "b": conv(4, 6), "c": conv(10, 5), "head": conv(19, 2)},
    groups={"a.weight:0": 4, "b.weight:0": 6, "c.weight:0": 5, "c.weight:1": (4, 6), "head.weight:1": (4, 5, 6)},
)
def dense_block(m: Any, x: Tensor) -> Any:
    """Every layer reads all before it; one of them comes twice at the end."""
    a = m.a(x)
    b = m.b(a)
    ab = torch.cat([a, b], 1)
    return m.head(torch.cat([ab, m.c(ab.relu()), a], 1))


@trap(
    lambda: {"a": conv(3, 4), "b": conv(3, 6), "c": conv(4, 5), "d": conv(6, 5), "head": conv(5, 2)},
    groups={"a.weight:0": 4, "b.weight:0": 6, "c.weight:0": 5, "c.weight:1": 4, "d.weight:1": 6},
)
def cat_then_split(m: Any, x: Tensor) -> Any:
    """What was put side by side comes apart again at sizes read from the parts."""
    a, b = m.a(x), m.b(x)
    a, b = torch.split_with_sizes(torch.cat([a, b], 1).relu(), [a.shape[1], b.shape[1]], 1)
    return m.head(m.c(a) + m.d(b))


@trap(
    lambda: {
        "stem": conv(3, 5),
        "a": conv(5, 4),
        "b": conv(5, 6),
        "c": conv(4, 7),
        "d": conv(6, 7),
        "head": conv(7, 2),
    },
    groups={"stem.weight:0": 5, "c.weight:0": 7, "a.weight:0": (), "b.weight:0": ()},
    refused="split",
)
def split_with_literal_sizes(m: Any, x: Tensor) -> Any:
    """The sizes stand in the code."""
    x = m.stem(x)
    a, b = torch.split_with_sizes(torch.cat([m.a(x), m.b(x)], 1), [4, 6], 1)
    return m.head(m.c(a) + m.d(b))


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 4), "b": conv(5, 6), "head": conv(5, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(4,), (5,), ()]},
)
def chunk_across_the_boundary(m: Any, x: Tensor) -> Any:
    """Halves of 4 + 6 channels are gated with one another: a_i goes with b_(i+1), b_0 with b_5."""
    x = m.stem(x)
    value, gate = torch.cat([m.a(x), m.b(x)], 1).chunk(2, 1)
    return m.head(value * gate.sigmoid())


@trap(
    lambda: {"a": conv(3, 12), "head": conv(6, 2)},
    groups={"a.weight:0": 6, "a.bias:0": 6, "head.weight:1": 6},
)
def chunk_gate(m: Any, x: Tensor) -> Any:
    """Channel i goes with its gate, i + 6."""
    value, gate = m.a(x).chunk(2, 1)
    return m.head(value * gate.sigmoid())


@trap(lambda: {"a": conv(3, 12), "head": conv(6, 2)}, groups={"a.weight:0": 6, "head.weight:1": 6})
def glu(m: Any, x: Tensor) -> Any:
    """The same gate in one operator."""
    return m.head(F.glu(m.a(x), 1))


@trap(
    lambda: {"stem": conv(3, 4), "a": conv(4, 8), "b": conv(4, 5), "c": conv(4, 5), "head": conv(5, 2)},
    groups={"stem.weight:0": 4, "b.weight:0": 5, "a.weight:0": [(4,), ()]},
)
def chunk_to_two_readers(m: Any, x: Tensor) -> Any:
    """Nothing ties the halves but that chunk makes them equal: both must lose the same number."""
    a, b = m.a(m.stem(x)).chunk(2, 1)
    return m.head(m.b(a) + m.c(b))


def shuffle(x: Tensor) -> Tensor:
    """Channels of two halves one after the other in turn."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@trap(
    lambda: {"stem": conv(3, 8), "branch": conv(4, 4), "head": conv(8, 2)},
    groups={"stem.weight:0": 4, "branch.weight:0": 4, "branch.weight:1": 4, "head.weight:1": 4},
)
def channel_shuffle(m: Any, x: Tensor) -> Any:
    """Split in halves, one goes through the branch, shuffled together: four channels of four indices each."""
    a, b = m.stem(x).chunk(2, 1)
    return m.head(shuffle(torch.cat([a, m.branch(b).relu()], 1)))


@trap(
    lambda: {"stem": conv(3, 8), "one": conv(4, 4), "two": conv(4, 4), "head": conv(8, 2)},
    refused="output",
)
def channel_shuffle_twice(m: Any, x: Tensor) -> Any:
    """Halves of a shuffle tie channels 0 and 2, 1 and 3, each further unit more: of four channels nothing is left."""
    a, b = m.stem(x).chunk(2, 1)
    a, b = shuffle(torch.cat([a, m.one(b)], 1)).chunk(2, 1)
    return m.head(shuffle(torch.cat([a, m.two(b)], 1)))


@trap(
    lambda: {"a": conv(3, 12), "shuffle": nn.ChannelShuffle(3), "head": conv(12, 2)},
    groups={"a.weight:0": [(3, 4), (4,)]},
)
def channel_shuffle_operator(m: Any, x: Tensor) -> Any:
    """The operator of that name: three groups, a literal, of four."""
    return m.head(m.shuffle(m.a(x)))


@trap(lambda: {"a": conv(3, 16), "head": conv(4, 2)}, groups={"a.weight:0": 4, "head.weight:1": 4})
def pixel_shuffle(m: Any, x: Tensor) -> Any:
    """Four indices become the pixels of one channel."""
    return m.head(F.pixel_shuffle(m.a(x), 2))


@trap(lambda: {"a": conv(3, 4), "head": conv(16, 2)}, groups={"a.weight:0": 4, "head.weight:1": 4})
def pixel_unshuffle(m: Any, x: Tensor) -> Any:
    """Every channel becomes four indices."""
    return m.head(F.pixel_unshuffle(m.a(x), 2))


@trap(lambda: {"a": conv(3, 4), "head": nn.Linear(64, 2)}, groups={"a.weight:0": 4, "head.weight:1": 4})
def flatten_to_linear(m: Any, x: Tensor) -> Any:
    """A channel is 16 features in a row."""
    return m.head(m.a(x).relu().flatten(1))


@trap(lambda: {"a": conv(3, 4), "head": nn.Linear(64, 2)}, groups={"a.weight:0": 4, "head.weight:1": 4})
def flatten_channels_last(m: Any, x: Tensor) -> Any:
    """A channel is every fourth feature."""
    return m.head(m.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1))


@trap(
    lambda: {"a": nn.Linear(8, 24), "b": conv(6, 5), "head": conv(5, 2)},
    inputs=(random(2, 8),),
    groups={"a.weight:0": 6, "b.weight:1": 6, "b.weight:0": 5},
)
def linear_to_picture(m: Any, x: Tensor) -> Any:
    """Features become 6 channels of 2 x 2; the picture is a literal, the channels are what is left."""
    return m.head(m.b(m.a(x).view(-1, m.b.weight.shape[1], 2, 2).relu()))


@trap(lambda: {"a": nn.Linear(6, 32), "head": nn.Linear(32, 2)}, inputs=(random(2, 6),), groups={}, refused="view")
def literal_sizes(m: Any, x: Tensor) -> Any:
    """Both factors of a feature's index stand in the code."""
    return m.head(m.a(x).view(x.shape[0], 4, 8).relu().flatten(1))


@trap(
    lambda: {"a": nn.Linear(6, 32), "head": nn.Linear(32, 2)},
    inputs=(random(2, 6),),
    groups={"a.weight:0": 8, "head.weight:1": 8},
)
def one_literal_size(m: Any, x: Tensor) -> Any:
    """Four stands in the code, the other factor is what is left."""
    return m.head(m.a(x).view(x.shape[0], 4, -1).relu().flatten(1))


@trap(lambda: {"a": conv(3, 6), "head": conv(6, 2)}, refused="softmax")
def softmax_over_channels(m: Any, x: Tensor) -> Any:
    """What is removed still counts in the denominator."""
    return m.head(m.a(x).softmax(1))


@trap(lambda: {"a": conv(3, 6), "head": conv(1, 2)}, refused="mean")
def mean_over_channels(m: Any, x: Tensor) -> Any:
    """The divisor would change."""
    return m.head(m.a(x).relu().mean(1, keepdim=True))


@trap(lambda: {"a": conv(3, 6), "head": conv(1, 2)}, refused="sum")
def sum_over_channels(m: Any, x: Tensor) -> Any:
    """Not a contraction: what is removed is zero only at the inputs of contractions, here it counts."""
    return m.head(m.a(x).sum(1, keepdim=True).sigmoid())


@trap(lambda: {"a": conv(3, 6), "head": conv(1, 2)}, refused="max")
def max_over_channels(m: Any, x: Tensor) -> Any:
    """The largest may be the one that is removed."""
    return m.head(m.a(x).amax(1, keepdim=True))


@trap(lambda: {"a": conv(3, 6), "head": conv(6, 2)}, refused="cumsum")
def cumsum_over_channels(m: Any, x: Tensor) -> Any:
    """What is removed counts in all that follow."""
    return m.head(m.a(x).cumsum(1))


@trap(
    lambda: {"a": nn.Linear(8, 6), "head": nn.Linear(6, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "head.weight:1": 6},
)
def cumsum_over_tokens(m: Any, x: Tensor) -> Any:
    """Each channel alone."""
    return m.head(m.a(x).cumsum(1))


@trap(lambda: {"a": conv(3, 6), "head": conv(6, 2)}, refused="norm")
def normalised_over_channels(m: Any, x: Tensor) -> Any:
    """Unit length over channels, with the square root of a sum that counts what is removed."""
    return m.head(F.normalize(m.a(x), dim=1))


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 8), "head": conv(4, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(4,), ()]},
)
def strided_slice(m: Any, x: Tensor) -> Any:
    """Every second channel: 2i and the unread 2i + 1 must go together, or the stride hits others."""
    return m.head(m.a(m.stem(x))[:, ::2])


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 8), "head": conv(6, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(6,), ()], "head.weight:1": [(6,), ()]},
)
def slice_to_the_end(m: Any, x: Tensor) -> Any:
    """The first two channels are not read, and must stay for the others to begin at 2."""
    return m.head(m.a(m.stem(x))[:, 2:])


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 8), "head": conv(6, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": (2,)},
    refused="slice",
)
def slice_from_the_start(m: Any, x: Tensor) -> Any:
    """The first six of eight: with one removed, six would reach further; the two behind them may go."""
    return m.head(m.a(m.stem(x))[:, :6])


@trap(lambda: {"a": conv(3, 4), "head": conv(3, 2)}, refused="index")
def index_by_numbers(m: Any, x: Tensor) -> Any:
    """Channels picked by literal numbers, which mean others once one is removed."""
    return m.head(m.a(x)[:, [3, 1, 2]])


@trap(
    lambda: {"a": conv(3, 4), "order": nn.Buffer(torch.tensor([3, 1, 0, 2])), "b": conv(4, 5), "head": conv(5, 2)},
    groups={"b.weight:0": 5, "a.weight:0": ()},
    refused="index",
)
def index_by_a_buffer(m: Any, x: Tensor) -> Any:
    """A permutation held in a buffer: to cut it is not enough, its values would have to be numbered anew."""
    return m.head(m.b(m.a(x).index_select(1, m.order)))


@trap(lambda: {"a": conv(3, 4), "head": conv(4, 2)}, groups={"a.weight:0": 4, "head.weight:1": 4})
def flip_channels(m: Any, x: Tensor) -> Any:
    """Channels in reverse."""
    return m.head(m.a(x).flip(1))


@trap(lambda: {"a": conv(3, 6), "head": conv(6, 2)}, groups={"a.weight:0": 3})
def flip_added(m: Any, x: Tensor) -> Any:
    """Channels added to themselves in reverse: i goes with 5 - i."""
    y = m.a(x)
    return m.head(y + y.flip(1))


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 4), "head": conv(4, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(3,), ()]},
)
def roll_by_one(m: Any, x: Tensor) -> Any:
    """The last channel comes first: it must stay, or another one would."""
    return m.head(m.a(m.stem(x)).roll(1, 1))


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 8), "head": conv(8, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(4,), ()]},
)
def roll_by_half(m: Any, x: Tensor) -> Any:
    """Halves change places: sound while both lose the same number."""
    y = m.a(m.stem(x))
    return m.head(y.roll(y.shape[1] // 2, 1))


@trap(lambda: {"a": conv(3, 4), "b": conv(3, 4), "head": conv(4, 2)}, groups={"a.weight:0": 4, "b.weight:0": 4})
def stack_and_sum(m: Any, x: Tensor) -> Any:
    """A sum over a new dimension ties both branches."""
    return m.head(torch.stack([m.a(x), m.b(x)]).sum(0).relu())


@trap(
    lambda: {"a": nn.Linear(8, 6), "head": nn.Linear(30, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "head.weight:1": 6},
)
def unbind_tokens(m: Any, x: Tensor) -> Any:
    """Tokens one by one, side by side again as features."""
    return m.head(torch.cat(m.a(x).unbind(1), -1))


@trap(lambda: {"a": conv(3, 3), "b": conv(1, 5), "head": conv(5, 2)}, groups={"b.weight:0": 5, "a.weight:0": ()})
def unbind_channels(m: Any, x: Tensor) -> Any:
    """Python unpacks three channels by name."""
    r, g, b = m.a(x).unbind(1)
    return m.head(m.b((r * g - b).unsqueeze(1)).relu())


@trap(
    lambda: {"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "head": nn.Linear(5, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "b.weight:0": 6},
)
def bmm_of_two(m: Any, x: Tensor) -> Any:
    """Both operands are computed; their common index is pruned in both."""
    return m.head(torch.bmm(m.a(x), m.b(x).transpose(1, 2)))


@trap(
    lambda: {"a": nn.Linear(8, 6), "b": nn.Linear(8, 4), "head": nn.Linear(4, 2)},
    inputs=TOKENS,
    groups={"a.weight:0": 6, "b.weight:0": 4, "head.weight:1": 4},
)
def channels_of_both_operands(m: Any, x: Tensor) -> Any:
    """A matrix of channels by channels: both of its dimensions are pruned, by different groups."""
    mixed = m.a(x).transpose(1, 2) @ m.b(x)
    return m.head(m.a(x) @ mixed)


@trap(
    lambda: {"a": conv(3, 4), "b": conv(4, 8), "head": conv(8, 2)},
    groups={"a.weight:0": 4, "b.weight:0": 4, "head.weight:1": 4},
)
def padded_shortcut(m: Any, x: Tensor) -> Any:
    """Zeros before and after the channels of the shortcut: those four outputs of the branch have no partner."""
    x = m.a(x).relu()
    return m.head(m.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


@trap(
    lambda: {"a": conv(3, 4), "head": nn.Linear(16, 2)},
    groups={"a.weight:0": 4, "head.weight:1": 4},
)
def unfold(m: Any, x: Tensor) -> Any:
    """Patches as features: a channel is four in a row."""
    return m.head(F.unfold(m.a(x), 2, stride=2).transpose(1, 2))


@trap(
    lambda: {"a": nn.Linear(8, 24), "head": conv(6, 2)},
    inputs=(random(2, 4, 8),),
    groups={"a.weight:0": 6, "head.weight:1": 6},
)
def fold(m: Any, x: Tensor) -> Any:
    """Features of four tokens become a picture."""
    return m.head(F.fold(m.a(x).transpose(1, 2), (4, 4), 2, stride=2))


@trap(lambda: {"a": conv(3, 12), "head": conv(6, 2)}, groups={"a.weight:0": 6, "head.weight:1": 6})
def maxout(m: Any, x: Tensor) -> Any:
    """The larger one of two neighbours: they go together, and two stays two."""
    y = m.a(x)
    return m.head(y.view(y.shape[0], -1, 2, *y.shape[2:]).amax(2))


@trap(
    lambda: {"a": conv(3, 4), "b": conv(4, 6), "head": conv(6, 2)},
    groups={"a.weight:0": 4, "b.weight:0": 6},
)
def in_place(m: Any, x: Tensor) -> Any:
    """Written over several times, once through a view."""
    x = m.a(x)
    x.relu_().mul_(2.0)
    y = m.b(x)
    y.view(y.shape[0], -1).add_(0.5)
    return m.head(F.hardtanh_(y))


@trap(
    lambda: {"stem": conv(3, 5), "a": conv(5, 8), "head": conv(8, 2)},
    groups={"stem.weight:0": 5, "a.weight:0": [(6,), ()]},
)
def assignment_to_a_slice(m: Any, x: Tensor) -> Any:
    """The first two channels are written over; they must stay, the others may go."""
    y = m.a(m.stem(x)).clone()
    y[:, :2] = y[:, :2] * 3.0
    return m.head(y)


@trap(
    lambda: {"a": conv(3, 6), "head": nn.Linear(6, 2)},
    groups={"a.weight:0": 6, "head.weight:1": 6},
)
def windows(m: Any, x: Tensor) -> Any:
    """Rolled, cut into windows of 2 x 2 and put together again, as in Swin: positions move, channels do not."""
    x = m.a(x).permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    n, h, w, c = x.shape
    x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = x * x.mean(1, keepdim=True).sigmoid()
    x = x.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return m.head(x.roll((1, 1), (1, 2)))


@trap(
    lambda: {"a": conv(3, 6), "reduce": nn.Linear(24, 10), "head": nn.Linear(10, 2)},
    inputs=IMAGE,
    groups={"a.weight:0": 6, "reduce.weight:1": 6, "reduce.weight:0": 10},
)
def patch_merging(m: Any, x: Tensor) -> Any:
    """The four neighbours of a pixel side by side: every channel is read at four places."""
    x = m.a(x).permute(0, 2, 3, 1)
    parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return m.head(m.reduce(torch.cat(parts, -1)).relu())


@trap(
    lambda: {"a": conv(3, 1), "b": conv(3, 6), "head": conv(6, 2)},
    groups={"b.weight:0": 6, "a.weight:0": ()},
)
def one_channel_stretched(m: Any, x: Tensor) -> Any:
    """A spatial gate of one channel stretches over all."""
    return m.head(m.b(x) * m.a(x).sigmoid())


@trap(
    lambda: {"a": conv(3, 4), "head": conv(8, 2)},
    groups={"a.weight:0": 4, "head.weight:1": 4},
)
def repeated_channels(m: Any, x: Tensor) -> Any:
    """The channels twice in a row."""
    return m.head(m.a(x).repeat(1, 2, 1, 1))


@trap(
    lambda: {"a": conv(3, 4), "head": conv(8, 2)},
    groups={"a.weight:0": 4, "head.weight:1": 4},
)
def repeated_each(m: Any, x: Tensor) -> Any:
    """Every channel twice, neighbours."""
    return m.head(m.a(x).repeat_interleave(2, 1))
