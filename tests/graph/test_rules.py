"""One tiny case per rule: which channel each index of the output comes from, and what is refused with which reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.graph import trace, tracing
from edgeprune.graph.atoms import FREE, Atoms
from edgeprune.graph.coupling import propagate
from edgeprune.graph.program import writes_in_place
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply
from tests.reference import difference, masked_output, random_plan, redraw

pytestmark = pytest.mark.unit

CONSTANT = torch.ones(4, 1, 1)
Function = Callable[[Tensor], Tensor]
BATCH, HEIGHT, WIDTH = [FREE] * 2, [FREE] * 3, [FREE] * 5


class Net(nn.Module):
    """`function` of what a convolution with four output channels gives, float32 [2, 4, 3, 5]."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def carried(function: Function) -> tuple[list[list[int]], set[str]]:
    """For every dimension of the result the channel of the convolution that each index comes from; what was refused."""
    program = tracing.trace_program(Net(function), (torch.zeros(2, 3, 3, 5),))
    atoms = Atoms()
    dims = propagate(program, atoms)
    output = next(node for node in program.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    own = atoms.dims["conv.weight", 0].tolist()
    first = own[0]
    channels = [[FREE if atom == FREE else int(atom) - first for atom in dim] for dim in dims[result]]
    reasons = {f"{r.operator}: {r.reason}" for atom, r in atoms.fixed.items() if atom in own}
    return channels, reasons - {"output: the model's output keeps its shape"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(torch.relu, [BATCH, [0, 1, 2, 3], HEIGHT, WIDTH], id="pointwise"),
        pytest.param(lambda x: x * 2 + 1, [BATCH, [0, 1, 2, 3], HEIGHT, WIDTH], id="with a number"),
        pytest.param(lambda x: x + x.mean((2, 3), keepdim=True), [BATCH, [0, 1, 2, 3], HEIGHT, WIDTH], id="broadcast"),
        pytest.param(lambda x: F.max_pool2d(x, 3), [BATCH, [0, 1, 2, 3], [FREE], [FREE]], id="pooling"),
        pytest.param(lambda x: x.mean((2, 3)), [BATCH, [0, 1, 2, 3]], id="mean over positions"),
        pytest.param(lambda x: x.permute(0, 2, 3, 1), [BATCH, HEIGHT, WIDTH, [0, 1, 2, 3]], id="permute"),
        pytest.param(lambda x: x.transpose(1, -1), [BATCH, WIDTH, HEIGHT, [0, 1, 2, 3]], id="transpose"),
        pytest.param(
            lambda x: torch.cat([x, x], 1), [BATCH, [0, 1, 2, 3, 0, 1, 2, 3], HEIGHT, WIDTH], id="concatenation"
        ),
        pytest.param(
            lambda x: torch.cat([x, x], 2), [BATCH, [0, 1, 2, 3], [FREE] * 6, WIDTH], id="concatenation, height"
        ),
        pytest.param(lambda x: x.softmax(-1), [BATCH, [0, 1, 2, 3], HEIGHT, WIDTH], id="softmax over positions"),
        pytest.param(lambda x: x[:, :, 1:], [BATCH, [0, 1, 2, 3], [FREE] * 2, WIDTH], id="slice of positions"),
        pytest.param(lambda x: x[:, :, 0], [BATCH, [0, 1, 2, 3], WIDTH], id="select a position"),
        pytest.param(lambda x: x[:1].expand(2, 4, 3, 5), [BATCH, [0, 1, 2, 3], HEIGHT, WIDTH], id="expand the batch"),
        pytest.param(
            lambda x: x.mean((2, 3), keepdim=True).flatten(1), [BATCH, [0, 1, 2, 3]], id="flatten without positions"
        ),
        pytest.param(
            lambda x: x.flatten(1), [BATCH, [0] * 15 + [1] * 15 + [2] * 15 + [3] * 15], id="flatten, channels outside"
        ),
        pytest.param(
            lambda x: x[:, :, :1, :2].permute(0, 2, 3, 1).flatten(1),
            [BATCH, [0, 1, 2, 3, 0, 1, 2, 3]],
            id="flatten, channels inside",
        ),
        pytest.param(lambda x: x.flatten(2), [BATCH, [0, 1, 2, 3], [FREE] * 15], id="flatten of positions"),
        pytest.param(lambda x: x.flatten(2).unsqueeze(1), [BATCH, [FREE], [0, 1, 2, 3], [FREE] * 15], id="unsqueeze"),
    ],
)
def test_channels_are_carried(function: Function, expected: list[list[int]]) -> None:
    assert carried(function) == (expected, set())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param(
            lambda x: x.softmax(1), "softmax: it normalises over a dimension that holds channels", id="softmax"
        ),
        pytest.param(lambda x: x.mean(1), "mean: it averages over a dimension that holds channels", id="mean"),
        pytest.param(lambda x: x.mean(), "mean: it averages over a dimension that holds channels", id="mean over all"),
        pytest.param(
            lambda x: x.view(2, 2, 2, 3, 5), "view: it splits or mixes a dimension that holds channels", id="split"
        ),
        pytest.param(
            lambda x: x[:, :2], "slice: it cuts or stretches a dimension that holds channels", id="slice of channels"
        ),
        pytest.param(lambda x: x[:, 0], "select: it picks single channels by number", id="select"),
        pytest.param(
            lambda x: x + torch.ones(4, 1, 1),
            "add: the other operand can't be pruned along this dimension",
            id="a tensor made on the way",
        ),
        pytest.param(
            lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 2),
            "max_pool2d: pooling mixes a dimension that holds channels",
            id="pooling over channels",
        ),
        pytest.param(lambda x: x.cumsum(1), "cumsum: operator 'cumsum' has no coupling rule", id="unknown operator"),
    ],
)
def test_what_cannot_be_proven_is_refused(function: Function, reason: str) -> None:
    assert reason in carried(function)[1]


class TwoBranches(nn.Module):
    """One branch goes through an operator without a rule, the other does not."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.strange = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.cat([self.known(x), self.strange(x).cumsum(1)], 1).mean((2, 3)))
        return result


def test_an_unknown_operator_refuses_only_what_it_touches() -> None:
    graph = trace(TwoBranches(), (torch.zeros(1, 3, 4, 4),))
    (group,) = graph.groups
    assert {m.parameter for m in group.members} == {"known.weight", "known.bias", "head.weight"}
    assert group.first.channels.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert ("cumsum", "operator 'cumsum' has no coupling rule") in {(r.operator, r.reason) for r in graph.refused}


@pytest.mark.parametrize(
    ("layer", "fixed"),
    [
        pytest.param(nn.Conv2d(4, 8, 1, groups=2), set(), id="whole convolution groups"),
        pytest.param(nn.ConvTranspose2d(4, 8, 1), {"conv_transpose2d"}, id="transposed"),
    ],
)
def test_layers_behind(layer: nn.Module, fixed: set[str]) -> None:
    net = Net(torch.relu)
    program = tracing.trace_program(nn.Sequential(net, layer), (torch.zeros(2, 3, 3, 5),))
    atoms = Atoms()
    propagate(program, atoms)
    channels = atoms.dims["0.conv.weight", 0]
    assert {atoms.fixed[a].operator for a in channels.tolist() if a in atoms.fixed} == fixed
    pairs = atoms.roots(channels).tolist()
    assert (pairs[0] == pairs[1]) == (not fixed), "a grouped convolution ties the channels of one convolution group"


def test_an_input_without_batch_is_refused_not_misread() -> None:
    program = tracing.trace_program(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), (torch.zeros(3, 5, 5),))
    atoms = Atoms()
    propagate(program, atoms)
    assert {r.reason for r in atoms.fixed.values()} >= {"its input has no batch dimension"}


class InPlace(nn.Module):
    """`function` between two convolutions, whose result both the second one and a later reader see."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(self.function(self.first(x))).mean((2, 3)))
        return result


def relu_of_a_value(x: Tensor) -> Tensor:
    y = x + 1
    y.relu_()
    return y * 2


def residual_after_relu(x: Tensor) -> Tensor:
    y = torch.relu_(x)
    return x + y  # x is what relu_ has written


def relu_of_a_view(x: Tensor) -> Tensor:
    x.flatten(2).relu_()
    return x


def relu_of_a_part(x: Tensor) -> Tensor:
    a, _ = x.chunk(2, 0)
    a.relu_()
    return x


def relu_of_dropout(x: Tensor) -> Tensor:
    y = F.dropout(x, training=False)  # hands x itself on
    y.relu_()
    return x + 1


@pytest.mark.parametrize(
    "function", [relu_of_a_value, residual_after_relu, relu_of_a_view, relu_of_a_part, relu_of_dropout]
)
def test_operators_that_write_into_their_input_are_followed(function: Callable[[Tensor], Tensor]) -> None:
    model = redraw(InPlace(function).double(), 0)
    x = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    graph = trace(model, x)
    assert not any(writes_in_place(n) and n.users == {} for n in graph.program.graph.nodes)
    dense = masked_output(graph, Plan(structure_hash=graph.structure_hash), model, x)
    with torch.no_grad():
        assert difference(dense, model(*x)) <= 1e-12, "the traced program computes something else"
        plan = random_plan(graph, 1)
        assert difference(apply(plan, model, x, graph=graph).module(*x), masked_output(graph, plan, model, x)) <= 1e-9


def test_a_tensor_that_python_code_holds_stays_whole() -> None:
    program = tracing.trace_program(Net(lambda x: x * CONSTANT), (torch.zeros(2, 3, 3, 5),))
    atoms = Atoms()
    propagate(program, atoms)
    root = atoms.roots(atoms.dims["conv.weight", 0])[0]
    assert atoms.reasons()[root].reason == "it is no parameter and no buffer"


def test_tracing_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    tracing.trace_program(model, (torch.zeros(1, 3, 2, 2),))
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
