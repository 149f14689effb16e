"""What the last layer of a branch can take up of the stream's error: exactly, where the branch can span it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.data import as_data, synthetic
from edgeprune.graph import trace
from edgeprune.plan_json import Plan
from edgeprune.quality import evaluate
from edgeprune.recovery import Method, repair
from edgeprune.recovery.least_squares import End
from edgeprune.recovery.reference import take_samples
from edgeprune.recovery.streams import Streams
from edgeprune.surgery import apply

pytestmark = pytest.mark.unit


class Chain(nn.Module):
    """x + A x, then that + B of it, with A and B of two linears each: no more than one linear map in all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(("method", "exact"), [("streams", True), ("least_squares", False)])
def test_the_next_branch_takes_up_what_a_dropped_one_gave(method: Method, exact: bool) -> None:
    """y = (1 + B)(1 + A) x; without the first block x + B' x, which is the same for B' = A + B + B A.

    Fitted to what the second branch itself gave, B (1 + A) x, it leaves A x out; the head is kept from helping.
    """
    torch.manual_seed(0)
    model = Chain().eval()
    x = torch.randn(1, 4)
    graph = trace(model, (x,))
    plan = Plan(structure_hash=graph.structure_hash, dropped=(graph.blocks[0].id,))
    pruned = apply(plan, model, (x,), graph=graph)
    data = as_data([torch.randn(200, 4, generator=torch.Generator().manual_seed(1))])
    repaired, report = repair(pruned, data, dense=model, graph=graph, method=method)
    assert report.chosen == method and {layer.layer for layer in report.layers} == {"second.0", "second.1", "head"}
    with torch.no_grad():
        x, _ = next(data.batches(200))
        a, b = model.first(x), model.second(x + model.first(x))
        missing = (x + a + b) - (x + repaired.module.get_submodule("second")(x))
    assert (float(missing.norm() / a.norm()) < 1e-2) == exact


def test_which_sums_are_shown() -> None:
    """The layer's own output, or its norm's; the first operand where both are; not what went through a relu."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 1) for _ in range(4))
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.norm(self.a(x))
            y = self.b(x)
            y += self.c(x)
            return torch.add(torch.relu(self.d(y)), y) + 1

    model = Net().eval()
    met: list[tuple[str, float]] = []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}

    def meet(name: str, branch: torch.Tensor, shortcut: torch.Tensor):  # type: ignore[no-untyped-def]
        expected = branch + shortcut
        return lambda total: met.append((name, float((total - expected).abs().max())))

    with torch.no_grad(), Streams(layers, [model.norm], meet):
        model(torch.randn(1, 2, 3, 3))
    assert met == [("a", 0.0), ("b", 0.0)]  # the last one adds to a sum, not to what b gave
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind_is_written_anew(bias: bool) -> None:
    """Conv and norm together give W x + bias; trained on, the norm's batch statistics are those it was given."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        x = torch.randn(5, 3, 6, 6)
        end = End(name="conv", layer=conv, norm=norm)
        weight, offset = end._read()
        linear = torch.nn.functional.conv2d(x, weight.reshape(conv.weight.shape), offset, padding=1)
        torch.testing.assert_close(norm(conv(x)), linear, rtol=1e-4, atol=1e-5)
        new = torch.randn(4, 27)
        branch = torch.empty(5, 4, 6, 6)
        end._write(new.double(), torch.tensor([1.0, 2.0, 3.0, 4.0]), x, branch)
        wanted = torch.nn.functional.conv2d(x, new.reshape(conv.weight.shape), torch.arange(1.0, 5.0), padding=1)
        for found in (branch, norm(conv(x)), norm.train()(conv(x))):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_more_pictures_are_fitted_to_where_there_are_more() -> None:
    """Up to 1,024, and a third as many held out; of few no more crops than a criterion takes (256)."""
    model = nn.Sequential(nn.Linear(4, 2))
    for count, expected in ((2000, (1024, 342)), (1200, (900, 300)), (100, (75, 25))):
        samples, num_fit = take_samples(synthetic((1, 4), count=count), model, seed=0)
        assert (num_fit, len(samples) - num_fit) == expected


def test_networks_without_sums_are_spared_the_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(1, 4)
    graph = trace(model, (x,))
    plan = Plan(structure_hash=graph.structure_hash, kept={graph.groups[0].id: (0, 1, 2, 3)})
    pruned = apply(plan, model, (x,), graph=graph)
    data = as_data([torch.randn(64, 4)])
    report = repair(pruned, data, dense=model, graph=graph)[1]
    assert not any(step.startswith("streams") for step in report.differences)
    assert evaluate(pruned.module, data, dense=model).kl is not None
