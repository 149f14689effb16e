"""The recorder: the operators that torch.export finds, writes in place followed, names, and the model's own numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.graph import tracing
from edgeprune.graph.program import Program, module_name, operator_name, writes_in_place
from edgeprune.graph.recording import NotRecorded, record
from tests.reference import redraw

pytestmark = pytest.mark.unit

X = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)
Function = Callable[[Tensor], Tensor]


def operators(program: Program) -> list[str]:
    return [operator_name(node) for node in program.graph.nodes if node.op == "call_function"]


def run(program: Program, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The recorded graph on the model's real tensors."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **program.constants}
    given = iter(inputs)
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    values = [tensors[program.parameters[name]] if name in program.parameters else next(given) for name in placeholders]
    with torch.no_grad():
        return list(program.module(*values))


class Net(nn.Module):
    """`function` behind a convolution."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
    "inplace": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Dropout(inplace=True)),
    "head": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(36, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ),
    "shuffle": lambda: Net(lambda x: F.channel_shuffle(x.view(2, 2, 2, 6, 6).transpose(1, 2).flatten(1, 2), 2)),
    "split": lambda: Net(lambda x: torch.cat([part.sigmoid() for part in x.chunk(2, 1)], 1)),
    "einsum": lambda: Net(lambda x: torch.einsum("bchw,bdhw->bcd", x, x).softmax(-1)),
}


@pytest.mark.parametrize("name", NETS)
def test_recorded_is_what_the_model_computes(name: str) -> None:
    model = redraw(NETS[name](), 0)
    program = tracing.trace_program(model, X)
    assert program.tracer == "recording"
    (found,) = run(program, model, X)
    with torch.no_grad():
        torch.testing.assert_close(found, model(*X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["convolutions", "head", "attention", "shuffle", "split"])
def test_the_operators_are_those_that_torch_export_finds(name: str) -> None:
    """Before it takes composite ones apart; it calls some by another name."""
    model = NETS[name]().eval()
    exported = torch.export.export(model, X, strict=False).graph
    expected = [operator_name(node) for node in exported.nodes if node.op == "call_function"]
    assert [o for o in operators(record(model, X)) if o != "getitem"] == [o for o in expected if o != "getitem"]


def relu_of_a_value(x: Tensor) -> Tensor:
    y = x + 1
    y.relu_()
    return y * 2


def residual_after_relu(x: Tensor) -> Tensor:
    y = torch.relu_(x)
    return x + y


def relu_of_a_view(x: Tensor) -> Tensor:
    x.flatten(2).relu_()
    return x


def relu_of_a_part(x: Tensor) -> Tensor:
    x[:, 1:3].relu_()
    return x


def relu_of_a_part_of_a_part(x: Tensor) -> Tensor:
    x[:, 1:3][:, :, 0].relu_()
    return x


def zeros_into_a_slice(x: Tensor) -> Tensor:
    x[:, :2] = 0
    return x


def tensor_into_a_slice(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def view_read_after_a_write(x: Tensor) -> Tensor:
    view = x.flatten(2)
    x.mul_(2)
    return view + 1


def part_read_after_a_write(x: Tensor) -> Tensor:
    part = x[:, 0]
    x[:, 0] += 1
    return part * 2


def relu_of_dropout(x: Tensor) -> Tensor:
    y = F.dropout(x, training=False)  # hands x itself on
    y.relu_()
    return x + 1


def relu_of_a_transposed(x: Tensor) -> Tensor:
    x.transpose(1, 2).relu_()
    return x


def relu_of_a_chunk(x: Tensor) -> Tensor:
    x.chunk(2, 1)[0].relu_()
    return x


WRITES = [
    relu_of_a_value,
    residual_after_relu,
    relu_of_a_view,
    relu_of_a_part,
    relu_of_a_part_of_a_part,
    zeros_into_a_slice,
    tensor_into_a_slice,
    view_read_after_a_write,
    part_read_after_a_write,
    relu_of_dropout,
]


@pytest.mark.parametrize("function", WRITES)
def test_writes_are_followed(function: Function) -> None:
    model = redraw(Net(function), 1)
    program = record(model, X)
    assert not any(writes_in_place(node) and not node.users for node in program.graph.nodes)
    (found,) = run(program, model, X)
    with torch.no_grad():
        torch.testing.assert_close(found, model(*X))


@pytest.mark.parametrize("function", [relu_of_a_transposed, relu_of_a_chunk])
def test_writes_that_it_cannot_follow_go_to_torch_export(function: Function) -> None:
    model = redraw(Net(function), 1)
    with pytest.raises(NotRecorded, match="written to"):
        record(model, X)
    program = tracing.trace_program(model, X)
    assert program.tracer == "torch.export"
    with torch.no_grad():
        torch.testing.assert_close(run(program, model, X)[0], model(*X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.a(x))
        return result


def test_tied_weights_go_by_their_first_name() -> None:
    program = record(Tied(), (torch.zeros(1, 4),))
    assert sorted(program.parameters.values()) == ["a.bias", "a.weight", "b.bias"]


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers: one a module holds, one only the code knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor = torch.full((4,), 2.0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) * self.scale + ONE
        return result


ONE = torch.ones(4)


def test_tensors_that_code_holds_are_constants() -> None:
    model = redraw(Constants(), 0)
    x = (torch.randn(2, 4),)
    program = record(model, x)
    assert sorted(program.constants) == ["constant_1", "scale"]
    assert program.constants["scale"] is model.scale
    with torch.no_grad():
        torch.testing.assert_close(run(program, model, x)[0], model(*x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.layer(x)) + 1
        return result


def test_a_module_that_is_called_again_is_told_apart() -> None:
    program = record(Twice(), (torch.zeros(1, 4),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [[name for name, _ in node.meta["nn_module_stack"].values()][-1] for node in calls]
    assert [operator_name(node) for node in calls] == ["linear", "relu", "linear", "relu", "add"]
    assert names == ["layer.0", "layer.1", "layer.0@1", "layer.1@1", ""]
    assert [module_name(node) for node in calls] == ["layer.0", "layer.1", "layer.0", "layer.1", ""]


def test_what_nobody_reads_is_left_out() -> None:
    program = record(Net(lambda x: (x.exp(), x + 1)[1]), X)
    assert operators(program) == ["conv2d", "add"]


def test_a_failing_model_gives_its_own_error() -> None:
    with pytest.raises(
        RuntimeError, match="mat1 and mat2 shapes cannot be multiplied|a and b must have same reduction"
    ):
        record(nn.Linear(3, 3), (torch.zeros(1, 4),))
