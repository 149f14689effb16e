"""Small hand-made networks, each with one thing that a coupling analysis gets wrong easily."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


class Program(nn.Module):
    """Named layers and a forward that is a plain function of them: `run(layers, *inputs)`."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        """Whatever the function gives."""
        return self.run(self, *inputs)


def conv(c_in: int, c_out: int, size: int = 3, **arguments: Any) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, **arguments)


def image(channels: int = 3, side: int = 16, seed: int = 1) -> Tensor:
    """[2, channels, side, side], normal values."""
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(seed))


def sequence(seed: int = 1) -> Tensor:
    """[2, 6, 24], normal values."""
    return torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def cascaded_cat() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        a = F.relu(m.a(x))
        ab = torch.cat([a, m.b(a)], 1)
        return m.d(torch.cat([ab, m.c(ab), a], 1)).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(8, 12), c=conv(20, 6), d=conv(34, 5)), (image(),)


def cat_then_split() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        left, right = torch.split(torch.cat([m.a(x), m.b(x)], 1), [12, 8], 1)
        return m.c(F.relu(left)).mean((2, 3)) + m.d(F.relu(right)).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(3, 12), c=conv(12, 5), d=conv(8, 5)), (image(),)


def chunk() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        a, b = m.a(x).chunk(2, 1)
        return m.b(a * torch.sigmoid(b)).mean((2, 3))

    return Program(run, a=conv(3, 16), b=conv(8, 5)), (image(),)


def channel_shuffle() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.c(F.relu(m.b(y))).mean((2, 3))

    return Program(run, a=conv(3, 16), b=conv(16, 16, groups=2), c=conv(16, 5)), (image(),)


def pixel_shuffle() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        return m.c(F.pixel_unshuffle(m.b(F.pixel_shuffle(F.relu(m.a(x)), 2)), 2)).mean((2, 3))

    return Program(run, a=conv(3, 16), b=conv(4, 6), c=conv(24, 5)), (image(side=8),)


def reshape_to_linear() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        return m.c(F.relu(m.b(F.relu(m.a(x)).reshape(x.shape[0], -1))))

    return Program(run, a=conv(3, 8), b=nn.Linear(8 * 36, 12), c=nn.Linear(12, 5)), (image(side=6),)


def grouped_with_cat() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        return m.d(F.relu(m.c(torch.cat([m.a(x), m.b(x)], 1)))).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(3, 16), c=conv(24, 12, groups=4), d=conv(12, 5)), (image(),)


def group_norm_uneven() -> Built:
    """Groups of the norm that do not agree with the producers' widths."""

    def run(m: Any, x: Tensor) -> Any:
        return m.c(F.relu(m.norm(torch.cat([m.a(x), m.b(x)], 1)))).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(3, 10), norm=nn.GroupNorm(3, 18), c=conv(18, 5)), (image(),)


def transposed_conv() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        return m.c(F.relu(m.norm(m.b(F.relu(m.a(x)))))).mean((2, 3))

    up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
    return Program(run, a=conv(3, 8), b=up, norm=nn.BatchNorm2d(12), c=conv(12, 5)), (image(),)


def squeeze_excite() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.c(y * torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))))).mean((2, 3))

    return Program(run, a=conv(3, 16), down=conv(16, 6, 1), up=conv(6, 16, 1), c=conv(16, 5)), (image(),)


def gated_mlp() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = m.norm(m.a(x))
        gate, value = m.up(y).chunk(2, -1)
        return m.head(m.a(x) + m.down(F.silu(gate) * value))

    layers = {"a": nn.Linear(24, 32), "up": nn.Linear(32, 80), "down": nn.Linear(40, 32), "head": nn.Linear(32, 5)}
    return Program(run, norm=nn.LayerNorm(32), **layers), (sequence(),)


def packed_qkv() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        q, k, v = m.qkv(m.norm(y)).reshape(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return m.head(y + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 32)))

    layers = {"a": nn.Linear(24, 32), "qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32), "head": nn.Linear(32, 5)}
    return Program(run, norm=nn.LayerNorm(32), **layers), (sequence(),)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding over the last dimension, the second half paired with the first."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.linspace(0, 2, half, dtype=x.dtype)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def grouped_query(rotary: bool) -> Built:
    """Four query heads on two heads of keys and values."""

    def run(m: Any, x: Tensor) -> Any:
        q = m.q(x).view(2, 6, 4, 8).transpose(1, 2)
        k, v = (layer(x).view(2, 6, 2, 8).transpose(1, 2) for layer in (m.k, m.v))
        if rotary:
            q, k = rotated(q), rotated(k)
        k, v = (t[:, :, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8) for t in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        return m.head(F.relu(m.out((weights @ v).transpose(1, 2).reshape(2, 6, 32))))

    layers = {"q": nn.Linear(24, 32), "k": nn.Linear(24, 16), "v": nn.Linear(24, 16), "out": nn.Linear(32, 20)}
    return Program(run, head=nn.Linear(20, 5), **layers), (sequence(),)


def shared_weights() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.c(F.relu(m.b(F.relu(m.b(y))))).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5)), (image(),)


def tied_embedding() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        return F.linear(m.b(F.relu(m.a(m.embed(x)))), m.embed.weight)

    layers = {"embed": nn.Embedding(40, 16), "a": nn.Linear(16, 32), "b": nn.Linear(32, 16)}
    return Program(run, **layers), (torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(1)),)


def two_inputs() -> Built:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        return m.c(F.relu(m.a(x) + m.b(y))).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(2, 8), c=conv(8, 5)), (image(), image(2, seed=2))


def two_outputs(dictionary: bool) -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        first, second = m.b(y).mean((2, 3)), m.d(F.relu(m.c(y)))
        return {"first": first, "second": second} if dictionary else (first, second)

    return Program(run, a=conv(3, 8), b=conv(8, 5), c=conv(8, 6), d=conv(6, 4)), (image(),)


def unbatched_constant() -> Built:
    """A tensor without batch dimension, held as a plain attribute, on the channels."""

    def run(m: Any, x: Tensor) -> Any:
        return m.b(F.relu(m.a(x) + m.constant)).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(8, 5), constant=torch.linspace(-1, 1, 8).reshape(8, 1, 1)), (image(),)


def layer_scale() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.c(y + m.scale * m.down(F.gelu(m.up(y))))

    layers = {"a": nn.Linear(24, 32), "up": nn.Linear(32, 40), "down": nn.Linear(40, 32), "c": nn.Linear(32, 5)}
    return Program(run, scale=parameter(32), **layers), (sequence(),)


def class_token() -> Built:
    def run(m: Any, x: Tensor) -> Any:
        y = m.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([m.token.expand(y.shape[0], -1, -1), y], 1) + m.position
        return m.head(m.norm(y + m.down(F.gelu(m.up(m.norm(y)))))[:, 0] + y.mean(1))

    layers = {"up": nn.Linear(16, 24), "down": nn.Linear(24, 16), "head": nn.Linear(16, 5), "norm": nn.LayerNorm(16)}
    embeddings = {"token": parameter(1, 1, 16), "position": parameter(1, 17, 16)}
    return Program(run, patch=nn.Conv2d(3, 16, 4, stride=4), **embeddings, **layers), (image(),)


def recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> Built:
    """Refused or handled; the layers around it are not touched by it."""

    def run(m: Any, x: Tensor) -> Any:
        return m.c(F.relu(m.b(m.cell(m.a(x))[0][:, -1])))

    layers = {"a": nn.Linear(24, 16), "cell": kind(16, 12, batch_first=True), "b": nn.Linear(12, 20)}
    return Program(run, **layers, c=nn.Linear(20, 5)), (sequence(),)


def dynamic_control_flow() -> Built:
    """Must be refused: which layer runs depends on the values."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.b(y).mean((2, 3)) if y.mean() > 0.5 else m.c(y).mean((2, 3))

    return Program(run, a=conv(3, 8), b=conv(8, 5), c=conv(8, 5)), (image(),)


ENTRIES: dict[str, Callable[[], Built]] = {
    "trap:cascaded_cat": cascaded_cat,
    "trap:cat_then_split": cat_then_split,
    "trap:chunk": chunk,
    "trap:channel_shuffle": channel_shuffle,
    "trap:pixel_shuffle": pixel_shuffle,
    "trap:reshape_to_linear": reshape_to_linear,
    "trap:grouped_with_cat": grouped_with_cat,
    "trap:group_norm_uneven": group_norm_uneven,
    "trap:transposed_conv": transposed_conv,
    "trap:squeeze_excite": squeeze_excite,
    "trap:gated_mlp": gated_mlp,
    "trap:packed_qkv": packed_qkv,
    "trap:grouped_query": lambda: grouped_query(rotary=False),
    "trap:rotary": lambda: grouped_query(rotary=True),
    "trap:shared_weights": shared_weights,
    "trap:tied_embedding": tied_embedding,
    "trap:two_inputs": two_inputs,
    "trap:two_outputs": lambda: two_outputs(dictionary=False),
    "trap:dictionary_output": lambda: two_outputs(dictionary=True),
    "trap:unbatched_constant": unbatched_constant,
    "trap:layer_scale": layer_scale,
    "trap:class_token": class_token,
    "trap:lstm": lambda: recurrent(nn.LSTM),
    "trap:gru": lambda: recurrent(nn.GRU),
    "trap:dynamic_control_flow": dynamic_control_flow,
}

MUST_REFUSE = frozenset(
    ("trap:dynamic_control_flow", "trap:cat_then_split", "trap:group_norm_uneven", "trap:unbatched_constant")
)
"""A refusal of the whole model is the right answer here, and the only one."""
