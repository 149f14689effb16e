"""What Python code computes sizes from: attributes that follow, literals and comparisons that keep a group whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.graph import ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply

pytestmark = pytest.mark.unit

X = (torch.zeros(2, 3, 4, 4),)


class Net(nn.Module):
    """`function` of itself between two convolutions: 8 channels, `heads` = 2, `width` = 8."""

    def __init__(self, function: Callable[[Any, Any], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.layer = layer or nn.Identity()
        self.heads, self.width, self.sizes = 2, 8, (2, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.function(self, self.first(x)))
        return result


def layer(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model.layer(x)  # type: ignore[operator]
    return result


def attributes(graph: ModelGraph, **kept: int) -> dict[str, int]:
    """`module.name[index]` to its value when the only group keeps this many of its channels."""
    return {
        f"{module}.{name}" + ("" if index is None else f"[{index}]"): rule.at(dict.fromkeys(rule.groups, kept["kept"]))
        for (module, name, index), rule in graph.attributes.items()
    }


class Last(nn.Module):
    """A layer norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


@pytest.mark.parametrize(
    ("module", "kept", "expected"),
    [
        pytest.param(nn.Conv2d(8, 8, 3, groups=8), 5, {"layer.groups": 5}, id="depthwise"),
        pytest.param(nn.Conv2d(8, 16, 3, groups=8), 5, {"layer.groups": 5}, id="two filters a channel"),
        pytest.param(nn.GroupNorm(4, 8), 3, {"layer.num_groups": 3}, id="group norm: 3 of 4 norm groups"),
        pytest.param(Last(), 5, {"layer.norm.normalized_shape[0]": 5}, id="layer norm"),
    ],
)
def test_attributes_of_layers_follow(module: nn.Module, kept: int, expected: dict[str, int]) -> None:
    model = Net(layer, module)
    if isinstance(module, nn.Conv2d):
        model.second = nn.Conv2d(module.out_channels, 4, 1)
    assert attributes(trace(model, X), kept=kept) == expected


def by_attribute(m: Any, x: Any) -> Any:
    return x.view(x.shape[0], m.width, -1).sigmoid().view(x.shape)


def by_item(m: Any, x: Any) -> Any:
    return x.unflatten(1, (m.sizes[0], m.sizes[1])).flatten(1, 2)


def by_shape(m: Any, x: Any) -> Any:
    return x.view(x.shape[0], x.shape[1], -1).sigmoid().view(x.shape)


def by_literal(m: Any, x: Any) -> Any:
    return x.view(2, 8, 16).sigmoid().view(x.shape)


def by_half(m: Any, x: Any) -> Any:
    return torch.cat([x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]], 1)


def by_literal_slice(m: Any, x: Any) -> Any:
    return torch.cat([x[:, :2].sigmoid(), x[:, 2:]], 1)


def by_literal_narrow(m: Any, x: Any) -> Any:
    return torch.cat([x.narrow(1, 0, 2).sigmoid(), x.narrow(1, 2, 6)], 1)


def by_split(m: Any, x: Any) -> Any:
    return torch.cat([part.sigmoid() for part in x.split([2, 6], 1)], 1)


def by_made_zeros(m: Any, x: Any) -> Any:
    return torch.cat([x, torch.zeros(2, 8, 4, 4)], 1)[:, : x.shape[1]]


def by_scale(m: Any, x: Any) -> Any:
    return x * m.width**-0.5


def by_shape_scale(m: Any, x: Any) -> Any:
    return x * x.shape[1] ** -0.5


def by_integer_scale(m: Any, x: Any) -> Any:
    return x * x.shape[1]


def by_assert(m: Any, x: Any) -> Any:
    assert x.shape[1] == m.width
    return x


def by_condition(m: Any, x: Any) -> Any:
    return x.relu() if x.shape[1] >= 8 else x


def by_other_condition(m: Any, x: Any) -> Any:
    return x.relu() if x.shape[1] > 0 else x


def by_pool(m: Any, x: Any) -> Any:
    return F.adaptive_avg_pool2d(x, (x.shape[2], x.shape[3]))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(by_shape, {}, id="shapes need nothing"),
        pytest.param(by_attribute, {".width": 5}, id="attribute of a view"),
        pytest.param(by_assert, {".width": 5}, id="attribute that a shape is compared with"),
        pytest.param(by_scale, {}, id="attribute for a scale stays"),
        pytest.param(by_other_condition, {}, id="condition that stays true"),
        pytest.param(by_pool, {}, id="positions"),
    ],
)
def test_code_that_follows(function: Callable[[Any, Any], Any], expected: dict[str, int]) -> None:
    graph = trace(Net(function), X)
    assert [(group.id, group.num_channels) for group in graph.groups] == [("first.weight:0", 8)]
    assert attributes(graph, kept=5) == expected


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param(by_literal, "fixes the size of a dimension", id="view"),
        pytest.param(by_literal_slice, "fixes the size of a dimension", id="slice"),
        pytest.param(by_literal_narrow, "fixes the size of a dimension", id="narrow"),
        pytest.param(by_split, "fixes the size of a dimension", id="split"),
        pytest.param(by_half, "fixes the size of a dimension", id="half of a width that may be odd"),
        pytest.param(by_shape_scale, "decides or computes by this size", id="scale"),
        pytest.param(by_integer_scale, "fixes the size of a dimension", id="multiplied by a size"),
        pytest.param(by_condition, "decides or computes by this size", id="condition"),
    ],
)
def test_code_that_fixes_a_size(function: Callable[[Any, Any], Any], reason: str) -> None:
    try:
        graph = trace(Net(function), X)
    except Exception as error:
        assert reason in str(error)
        assert "test_following.py:" in str(error)
    else:
        assert not any("first.weight" in group.id for group in graph.groups), "it may not shrink"


class Heads(nn.Module):
    """Attention whose heads and width the code reads from attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
        result: Tensor = self.out(y.reshape(n, t, self.num_heads * self.head_dim))
        return result


def test_heads_and_head_width_follow() -> None:
    graph = trace(Heads(), (torch.zeros(1, 5, 6),))
    found = {name: rule.at({group.id: 1 for group in graph.groups}) for (_, name, _), rule in graph.attributes.items()}
    assert "num_heads" in found
    assert found["num_heads"] == 1


def test_attention_of_torch_keeps_the_width_of_what_it_reads() -> None:
    """`nn.MultiheadAttention` compares the width of its input with its own, out of the trace's sight."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.embed(x)
            y = self.attention(y, y, y)[0]
            logits: torch.Tensor = self.head(self.hidden(y).relu())
            return logits

    graph = trace(Attention(), (torch.randn(2, 4, 5),))
    assert [group.id for group in graph.groups] == ["head.weight:1"]
    assert any("decides or computes by this size" in refusal.reason for refusal in graph.refused)


def test_layers_of_torch_follow_without_origins_of_sizes() -> None:
    """A write through a transposed view can't be recorded: torch.export traces, which tells no origins."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
            self.norm, self.head = nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            x.transpose(2, 3).mul_(2)
            y: torch.Tensor = self.head(self.norm(self.depthwise(self.conv(x))))
            return y

    model, x = Written(), (torch.randn(1, 3, 6, 6),)
    graph = trace(model, x)
    assert graph.program.tracer == "torch.export"
    (group,) = graph.groups
    pruned = apply(Plan(structure_hash=graph.structure_hash, kept={group.id: tuple(range(4))}), model, x, graph=graph)
    assert pruned.module.get_submodule("depthwise").groups == 4
    assert pruned.module.get_submodule("norm").num_groups == 2


def test_a_width_that_becomes_a_tensor_is_a_number_to_compute_with() -> None:
    """The correlation of optical flow networks divides by `torch.sqrt(torch.tensor(channels))`."""

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            x = x / torch.sqrt(torch.tensor(x.shape[1]))
            y: torch.Tensor = self.head(self.second(x).relu())
            return y

    graph = trace(Divided(), (torch.zeros(1, 3, 4, 4),))
    assert [group.num_channels for group in graph.groups] == [6]
    assert any("decides or computes by this size" in refusal.reason for refusal in graph.refused)
