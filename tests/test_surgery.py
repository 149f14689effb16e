"""Exactness: the pruned network equals the dense program in float64 with zeros at the inputs of its contractions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import RefusedError, SurgeryError
from edgeprune.graph import trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply, positions_of
from edgeprune.weights import weights_hash
from edgeprune.zero_branch import ZeroBranch
from tests.reference import difference, masked_output, random_plan, redraw, shift_one

SEVEN = (
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
)


class Residual(nn.Module):
    """conv - [conv - norm - relu - conv] + x - pool - linear, with squeeze-excite-like gating."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), nn.Sigmoid())
        self.b = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.a(x))
        y = self.b(y * self.gate(y))
        x = torch.relu(x + y)
        head: torch.Tensor = self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 2), 1))
        return head


class Concatenated(nn.Module):
    """Two branches side by side, read by a grouped and by an ordinary convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 8, 3, groups=4)
        self.plain = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        head: torch.Tensor = self.head((self.grouped(x) * self.plain(x)).mean((2, 3)))
        return head


@pytest.mark.parametrize("network", [Residual, Concatenated])
@pytest.mark.parametrize("seed", range(5))
def test_small_networks_are_exact_and_the_control_fails(network: type[nn.Module], seed: int) -> None:
    model = redraw(network().double(), seed)
    x = (torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    pruned = apply(plan, model, x, graph=graph)
    reference = masked_output(graph, plan, model, x)
    assert difference(pruned.module(*x), reference) <= 1e-9
    moved = shift_one(plan, graph)
    assert difference(apply(moved, model, x, graph=graph).module(*x), reference) > 1e-6


@pytest.mark.integration
@pytest.mark.parametrize("name", SEVEN)
def test_torchvision_networks_are_exact(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = redraw(getattr(torchvision.models, name)(num_classes=50).double(), 0)
    size = 64 if name != "vgg11_bn" else 32
    x = (torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)
    graph = trace(model, x)
    dense = model(*x)
    assert dense.std() > 1e-3
    for seed in range(2):
        plan = random_plan(graph, seed)
        pruned = apply(plan, model, x, graph=graph)
        reference = masked_output(graph, plan, model, x)
        assert difference(pruned.module(*x), reference) <= 1e-9
    moved = shift_one(plan, graph)
    assert difference(apply(moved, model, x, graph=graph).module(*x), reference) > 1e-6


def test_the_pruned_network_is_smaller_trainable_and_leaves_the_dense_one_alone() -> None:
    model = redraw(Residual(), 0)
    before = weights_hash(model)
    x = (torch.randn(2, 3, 9, 9),)
    graph = trace(model, x)
    pruned = apply(random_plan(graph, 3, drop=0.0), model, x, graph=graph)
    assert sum(p.numel() for p in pruned.module.parameters()) < sum(p.numel() for p in model.parameters())
    pruned.module(*x).square().mean().backward()
    assert all(p.grad is not None for p in pruned.module.parameters())
    depthwise = pruned.module.get_submodule("depthwise")
    assert isinstance(depthwise, nn.Conv2d)
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == depthwise.weight.shape[0]
    assert weights_hash(model) == before == pruned.origin


def test_dropping_a_block_removes_its_parameters() -> None:
    model = redraw(Residual(), 0)
    x = (torch.randn(1, 3, 9, 9),)
    graph = trace(model, x)
    (block,) = graph.blocks
    pruned = apply(Plan(structure_hash=graph.structure_hash, dropped=(block.id,)), model, x, graph=graph)
    assert isinstance(pruned.module.get_submodule("b"), ZeroBranch)
    assert {name.split(".")[0] for name, _ in pruned.module.named_parameters()} == {"stem", "head"}


def test_an_empty_plan_changes_nothing() -> None:
    model = redraw(Residual(), 0)
    x = (torch.randn(1, 3, 9, 9),)
    graph = trace(model, x)
    pruned = apply(Plan(structure_hash=graph.structure_hash), model, x, graph=graph)
    assert weights_hash(pruned.module) == weights_hash(model)


def test_a_plan_of_another_model_is_refused() -> None:
    model, x = Residual(), (torch.randn(1, 3, 9, 9),)
    with pytest.raises(SurgeryError, match="made for another model"):
        apply(Plan(structure_hash="0" * 64), model, x)


def test_faulty_plans_are_named() -> None:
    model, x = Residual(), (torch.randn(1, 3, 9, 9),)
    graph = trace(model, x)
    for kept, message in (
        ({"stem.weigt:0": (0,)}, "did you mean 'stem.weight:0'|lacks"),
        ({graph.groups[0].id: (99,)}, "has only"),
    ):
        with pytest.raises(SurgeryError, match=message):
            apply(Plan(structure_hash=graph.structure_hash, kept=kept), model, x, graph=graph)


class HardWired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8 * 7 * 7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.head(self.conv(x).reshape(-1, 8 * 7 * 7))
        return head


def test_a_hard_wired_size_is_named_with_file_and_line() -> None:
    with pytest.raises(RefusedError) as caught:
        trace(HardWired(), (torch.randn(1, 3, 9, 9),))
    assert any(re.search(r"reshape: the code at .*test_surgery.py:\d+ fixes the size", r) for r in caught.value.reasons)


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(RefusedError, match="output keeps its shape"):
        trace(nn.Linear(3, 4), (torch.randn(1, 3),))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 0.5
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.qkv, self.proj, self.head = nn.Linear(16, 3 * 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        logits: torch.Tensor = self.head(x + self.proj(y.transpose(1, 2).reshape(n, t, -1)))
        return logits


def test_a_pruned_attention_trains_and_can_be_cut_again() -> None:
    model, x = redraw(Attention(), 0), (torch.randn(8, 5, 6),)
    for heads in (3, 2):
        graph = trace(model, x)
        group = next(g for g in graph.groups if g.num_channels == heads + 1)
        kept = {group.id: positions_of(graph, group.id, np.arange(heads))}
        model = apply(Plan(structure_hash=graph.structure_hash, kept=kept), model, x, graph=graph).module
        assert vars(model)["num_heads"] == heads
        assert model.get_submodule("proj").in_features == 4 * heads
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(x[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
