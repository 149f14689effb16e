"""Which residual branches may be dropped, and which not; dropping them is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import RefusedError
from edgeprune.graph import Block, ModelGraph, trace
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply
from edgeprune.zero_branch import ZeroBranch
from tests.reference import difference, masked_output, redraw

pytestmark = pytest.mark.unit


def conv(c_in: int, c_out: int, window: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, window, stride=stride, padding=window // 2, bias=False)


class Around(nn.Module):
    """A stem, the module in question as `body`, and a head."""

    def __init__(self, body: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), body, nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return result


def example(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...], ModelGraph]:
    model = redraw(model.double(), 0)
    x = (torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    return model, x, trace(model, x)


def blocks_of(body: nn.Module, out: int = 8) -> tuple[Block, ...]:
    """The blocks, each of them dropped once and compared with the dense program whose branch is zero."""
    model, x, graph = example(Around(body, out))
    for block in graph.blocks:
        plan = Plan(structure_hash=graph.structure_hash, dropped=(block.id,))
        with torch.no_grad():
            pruned = apply(plan, model, x, graph=graph).module
            assert difference(pruned(*x), masked_output(graph, plan, model, x)) <= 1e-12
            assert difference(pruned(*x), model(*x)) > 1e-6
    return graph.blocks


class Basic(nn.Module):
    """ResNet's basic block, with a projection where the shape changes."""

    def __init__(self, out: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 6, 3, stride), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(6, out, 3), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Sequential(conv(8, out, 1, stride), nn.BatchNorm2d(out)) if out != 8 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.project(x)
        result: Tensor = self.relu(y)
        return result


def test_identity_shortcut() -> None:
    (block,) = blocks_of(Basic())
    assert block.id == "body"
    assert block.zero_modules == ("body.bn2",)
    assert block.skipped_modules == ("body.bn1", "body.conv1", "body.conv2")
    assert block.inside == ("body.bn1.bias:0",)
    assert "body.relu" not in block.skipped_modules, "it is called once more, behind the add"


def test_projection_shortcut() -> None:
    (block,) = blocks_of(Basic(out=12, stride=2), out=12)
    assert block.zero_modules == ("body.bn2",)
    assert not any(name.startswith("body.project") for name in block.skipped_modules)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(8, 6, 3), nn.BatchNorm2d(6), conv(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return result


def test_pre_activation() -> None:
    (block,) = blocks_of(PreActivation())
    assert block.zero_modules == ("body.conv2",)
    assert block.skipped_modules == ("body.bn1", "body.bn2", "body.conv1")


class TwoInOne(nn.Module):
    """Two residual branches in one module, as a transformer's layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(8, 4), conv(4, 8)), nn.Sequential(conv(8, 5), nn.ReLU(), conv(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        result: Tensor = x + self.b(x)
        return result


def test_two_blocks_in_one_module_are_numbered() -> None:
    first, second = blocks_of(TwoInOne())
    assert (first.id, second.id) == ("body:0", "body:1")
    assert (first.zero_modules, second.zero_modules) == (("body.a",), ("body.b",))
    assert (first.inside, second.inside) == (("body.a.0.weight:0",), ("body.b.0.weight:0",))


class Nested(nn.Module):
    """x + g(x + f(x)): a branch around a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = conv(8, 8), TwoInOne().a, conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        result: Tensor = x + self.after(y + self.inner(y))
        return result


def test_a_branch_around_another_is_a_block_too() -> None:
    inner, outer = blocks_of(Nested())
    assert (inner.zero_modules, outer.zero_modules) == (("body.inner",), ("body.after",))
    assert outer.skipped_modules == ("body.before", "body.inner")
    assert (inner.within, outer.within) == (outer.id, None) == ("body:1", None)
    assert inner.nodes < outer.nodes
    assert inner.inside == ("body.inner.0.weight:0",)
    assert outer.inside == ("body.after.weight:1", "body.inner.0.weight:0")


def test_the_outer_drop_takes_the_inner_one_along() -> None:
    model, x, graph = example(Around(Nested()))
    inner, outer = graph.blocks
    hash_of = graph.structure_hash
    plans = [Plan(structure_hash=hash_of, dropped=names) for names in ((outer.id,), (inner.id, outer.id))]
    one, both = (apply(plan, model, x, graph=graph).module for plan in plans)
    with torch.no_grad():
        assert difference(both(*x), masked_output(graph, plans[1], model, x)) <= 1e-12
        assert torch.equal(one(*x), both(*x))
    assert [name for name, _ in one.named_modules()] == [name for name, _ in both.named_modules()]
    assert not list(both.get_submodule("body").parameters()), "nothing of either block is left"


def test_nested_blocks_between_pruned_channels() -> None:
    model, x, graph = example(Around(Nested()))
    inner, outer = graph.blocks
    kept = {group.id: (0, 2) for group in graph.groups}
    for dropped in ((), (inner.id,), (outer.id,), (inner.id, outer.id)):
        plan = Plan(structure_hash=graph.structure_hash, kept=kept, dropped=dropped)
        with torch.no_grad():
            pruned = apply(plan, model, x, graph=graph).module
            assert difference(pruned(*x), masked_output(graph, plan, model, x)) <= 1e-12


class Holding(nn.Module):
    """x + f(x) around whole networks, as super-resolution's residual groups are built."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.parts(x)
        return result


def test_blocks_lie_in_blocks_to_any_depth() -> None:
    group = Holding(PreActivation(), PreActivation(), conv(8, 8))
    blocks = blocks_of(Holding(group, conv(8, 8)))
    assert {block.id: block.within for block in blocks} == {
        "body.parts.0.parts.0": "body.parts.0",
        "body.parts.0.parts.1": "body.parts.0",
        "body.parts.0": "body",
        "body": None,
    }


def test_a_branch_that_ends_in_a_branch_is_zero_when_its_module_is() -> None:
    *_, outer = blocks_of(Holding(conv(8, 8), PreActivation()))
    assert outer.zero_modules == ("body.parts",)


class Functional(nn.Module):
    """x + (y + f(y)) without a module around the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.f = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        result: Tensor = x + (y + self.f(y))
        return result


def test_a_sum_of_zeros_is_zero() -> None:
    inner, outer = blocks_of(Functional())
    assert inner.zero_modules == ("body.f",)
    assert outer.zero_modules == ("body.before", "body.f")


class Parallel(nn.Module):
    """x + (a(n(x)) + b(n(x))): a transformer's layer whose branches read one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(8), nn.Sequential(conv(8, 4), conv(4, 8)), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + (self.a(y) + self.b(y))
        return result


def test_branches_that_are_added_to_one_another_go_each_or_together() -> None:
    b, a, layer = blocks_of(Parallel())
    assert (a.zero_modules, a.within) == (("body.a",), layer.id)
    assert (b.zero_modules, b.within) == (("body.b",), layer.id)
    assert not a.nodes & b.nodes
    assert layer.zero_modules == ("body.a", "body.b")
    assert layer.skipped_modules == ("body.norm",)


class Masked(nn.Module):
    """Every branch reads the trunk and something that was computed once for all, as attention reads a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.a, self.b = conv(8, 8), nn.Sequential(conv(8, 4), conv(4, 8)), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.sigmoid(self.mask(x))
        x = torch.relu(x)
        x = x + self.a(x * mask)
        result: Tensor = x + self.b(x * mask)
        return result


def test_a_branch_beside_its_trunk_may_read_more() -> None:
    first, second = blocks_of(Masked())
    assert (first.zero_modules, second.zero_modules) == (("body.a",), ("body.b",))
    assert not any(name.startswith("body.mask") for name in (*first.skipped_modules, *second.skipped_modules))


class MaskedBesideAProjection(nn.Module):
    """p(x) + f(x, y): f may as well be the trunk, and p the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.project, self.f = conv(8, 8), conv(8, 8), nn.Sequential(conv(8, 4), conv(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.other(x))
        result: Tensor = (self.project(torch.relu(x)) + self.f(torch.relu(x) * y)) * y
        return result


def test_beside_a_projection_the_branch_reads_the_trunk_alone() -> None:
    (block,) = blocks_of(MaskedBesideAProjection())
    assert block.zero_modules == ("body.project",)


class Shifted(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + (1.0 + self.a(y) + self.b(y))
        return result


class WithTheTrunk(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x + self.a(x))


@pytest.mark.parametrize(("body", "zero"), [(Shifted(), "body.b"), (WithTheTrunk(), "body.a")])
def test_a_sum_with_anything_else_is_not_zero(body: nn.Module, zero: str) -> None:
    """The branch around would leave 1, or the trunk."""
    (block,) = blocks_of(body)
    assert block.zero_modules == (zero,)


def test_consecutive_branches_are_two_blocks_whose_drops_give_the_trunk() -> None:
    """The layer of both is no third decision: it is the two drops."""
    model, x, graph = example(Around(TwoInOne()))
    assert [block.within for block in graph.blocks] == [None, None]
    plan = Plan(structure_hash=graph.structure_hash, dropped=tuple(block.id for block in graph.blocks))
    pruned = apply(plan, model, x, graph=graph).module
    with torch.no_grad():
        body = pruned.get_submodule("body")
        trunk = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        assert torch.equal(body(trunk), trunk)
    assert not list(body.parameters())


class ReadOutside(nn.Module):
    """What the branch computes is read behind the add as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = (x + self.b(y)) * y
        return result


def test_a_branch_that_is_read_from_outside_is_no_block() -> None:
    assert blocks_of(ReadOutside()) == ()


class Symmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x)
        return result


def test_two_branches_alike_are_no_block() -> None:
    assert blocks_of(Symmetric()) == ()


class Activated(nn.Module):
    """x + sigmoid(f(x)): zeros before the sigmoid would add one half."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.f(x))


def test_a_branch_that_ends_in_an_operator_which_moves_zero_is_no_block() -> None:
    assert blocks_of(Activated()) == ()


class Scaled(nn.Module):
    """A layer scale and dropout behind the last convolution, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gamma, self.dropout = conv(8, 8, 3), nn.Parameter(torch.ones(8, 1, 1)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.dropout(self.gamma * self.f(x))
        return result


def test_operators_that_keep_zero_may_follow() -> None:
    (block,) = blocks_of(Scaled())
    assert block.zero_modules in (("body.f",), ("body.dropout",))


class WritesBehindAPool(nn.Module):
    """The branch writes into what a module of it gives: were the pool to hand x on, x itself would change."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.f = nn.AvgPool2d(3, stride=1, padding=1), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.f(torch.relu_(self.pool(x)))
        return result


def test_a_dropped_branch_leaves_the_trunk_alone() -> None:
    (block,) = blocks_of(WritesBehindAPool())
    assert block.skipped_modules == ("body.pool",)


class Widening(nn.Module):
    """Functional operators between the modules of the branch need each one's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.f = conv(8, 12), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.f(self.wide(x) * torch.arange(12.0, dtype=x.dtype).view(12, 1, 1))
        return result


def test_modules_of_a_dropped_branch_keep_their_shapes() -> None:
    (block,) = blocks_of(Widening())
    model, x, graph = example(Around(Widening()))
    pruned = apply(Plan(structure_hash=graph.structure_hash, dropped=(block.id,)), model, x, graph=graph).module
    wide, end = pruned.get_submodule("body.wide"), pruned.get_submodule("body.f")
    assert isinstance(wide, ZeroBranch) and wide.leaves == [torch.Size((2, 12, 6, 6))]
    assert isinstance(end, ZeroBranch) and end.leaves == [torch.Size((2, 8, 6, 6))]


class SharedBody(nn.Module):
    """One residual module called twice: its modules serve two adds, so that neither can go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(conv(8, 4), conv(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        result: Tensor = x + self.f(x)
        return result


def test_a_branch_that_serves_two_adds_is_no_block() -> None:
    assert blocks_of(SharedBody()) == ()


def test_a_block_with_pruned_channels_around_it() -> None:
    model, x, graph = example(Around(Basic()))
    (block,) = graph.blocks
    trunk = next(g for g in graph.groups if g.id not in block.inside)
    plan = Plan(structure_hash=graph.structure_hash, kept={trunk.id: (0, 3, 5)}, dropped=(block.id,))
    with torch.no_grad():
        pruned = apply(plan, model, x, graph=graph).module
        assert difference(pruned(*x), masked_output(graph, plan, model, x)) <= 1e-12
    assert not list(pruned.get_submodule("body").parameters()), "nothing of the block is left"


def test_a_network_of_one_layer_has_neither_group_nor_block() -> None:
    with pytest.raises(RefusedError, match="nothing in this model can be pruned"):
        trace(conv(3, 4), (torch.zeros(1, 3, 4, 4),))
