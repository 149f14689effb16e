from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgeprune.errors import EdgepruneError
from edgeprune.onnx_export import CONTRACTIONS, drop_zero_adds, fold_batch_norms, onnx_from_module
from tests.small_models import Net, redrawn

pytestmark = pytest.mark.unit
X = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def run(model: onnx.ModelProto, *inputs: torch.Tensor) -> list[np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString())
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feeds))


def off(a: np.ndarray, b: torch.Tensor) -> float:
    return float(np.abs(a - b.detach().numpy()).max() / np.abs(b.detach().numpy()).max())


def contractions(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in CONTRACTIONS]


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_nodes_bear_the_names_of_their_modules_and_outputs_agree(capfd: pytest.CaptureFixture[str]) -> None:
    net = redrawn(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = onnx_from_module(net, (X,))
    assert capfd.readouterr() == ("", "")
    expected = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert contractions(model) == expected
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert "BatchNormalization" not in operators(model)
    assert off(run(model, X)[0], net(X)) < 1e-5


def test_the_module_is_left_as_it_was() -> None:
    net = Net()
    redrawn(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    net.blocks[0].eval()
    onnx_from_module(net, (X,))
    assert net.training and not net.blocks[0].training and net.blocks[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_same_module_gives_the_same_bytes_without_paths() -> None:
    first, second = (onnx_from_module(redrawn(Net()), (X,)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert b".py" not in first


def test_dropped_blocks_vanish() -> None:
    net = redrawn(Net(dropped=True))
    model = onnx_from_module(net, (X,))
    assert contractions(model) == ["conv", "head"]
    assert not {"Add", "ConstantOfShape", "Expand"} & operators(model)
    assert off(run(model, X)[0], net(X)) < 1e-5


class Tokens(nn.Module):
    """Linears on 3-d inputs, without bias, one called twice; a norm over the last axis; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.twice = nn.Linear(24, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.gelu(self.first(tokens)) * mask
        y = self.norm(self.twice(torch.relu(self.twice(y))))
        return self.head(y), y.mean(1)


def test_linears_inputs_and_outputs_keep_their_names() -> None:
    net = redrawn(Tokens())
    inputs = (torch.randn(2, 7, 12), torch.rand(2, 7, 1))
    model = onnx_from_module(net, inputs)
    assert contractions(model) == ["first", "twice", "twice#1", "head"]
    assert [value.name for value in model.graph.input] == ["tokens", "mask"]
    assert [value.name for value in model.graph.output] == ["output_0", "output_1"]
    found = run(model, *inputs)
    assert all(off(a, b) < 1e-5 for a, b in zip(found, net(*inputs), strict=True))


class Shared(nn.Module):
    """Batch norms that must not be folded: the convolution is read twice, called twice, or follows its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)
        self.other = nn.Conv2d(3, 3, 3, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = self.a(y) + y
        result: torch.Tensor = self.c(self.other(torch.relu(self.b(self.conv(z)))))
        return result


def test_only_safe_batch_norms_are_folded() -> None:
    net = redrawn(Shared())
    program = torch.export.export(net, (X,))
    assert fold_batch_norms(program) == 0
    assert off(run(onnx_from_module(net, (X,)), X)[0], net(X)) < 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folding_is_exact_in_every_dimension(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3, groups=2, bias=dims == 2)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6)
    net = redrawn(nn.Sequential(conv, norm))
    x = torch.randn(2, 4, *[7] * dims)
    program = torch.export.export(net, (x,))
    assert fold_batch_norms(program) == 1
    assert torch.allclose(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def zero_add(zeros: tuple[int, ...], total: tuple[int, ...] = (2, 3), *, to_output: bool = False) -> onnx.ModelProto:
    """relu(0 + relu(x)) with x [2, 3]; `total` is the shape of the sum."""
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Add", ["z", "y"], ["s"])]
    if not to_output:
        nodes.append(helper.make_node("Relu", ["s"], ["out"]))
    x, y = (helper.make_tensor_value_info(name, 1, (2, 3)) for name in ("x", "y"))
    s, out = (helper.make_tensor_value_info(name, 1, total) for name in ("s", "out"))
    constant = numpy_helper.from_array(np.zeros(zeros, np.float32), "z")
    graph = helper.make_graph(nodes, "g", [x], [s if to_output else out], [constant], value_info=[y, s])
    return helper.make_model(graph)


def test_adding_zeros_is_cut_only_where_the_shape_stays() -> None:
    model = zero_add((2, 3))
    assert drop_zero_adds(model) == 1
    assert [list(node.input) for node in model.graph.node] == [["x"], ["y"]]
    assert drop_zero_adds(zero_add((1, 3))) == 1
    assert drop_zero_adds(zero_add((2, 3), to_output=True)) == 0
    assert drop_zero_adds(zero_add((4, 2, 3), (4, 2, 3))) == 0


def test_what_cannot_be_traced_is_one_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(EdgepruneError, match="cannot trace Branches") as caught:
        onnx_from_module(Branches(), (X,))
    assert "\n" not in str(caught.value)


def test_large_weights_come_back_and_operators_bear_the_names_of_the_trace() -> None:
    """Weights that only a MatMul reads are kept from the simplifier."""
    net = redrawn(nn.Sequential(nn.LayerNorm(160), nn.Linear(160, 200), nn.GELU(), nn.Linear(200, 8)))
    x = torch.randn(1, 5, 160)
    model = onnx_from_module(net, (x,))
    assert [value.name for value in model.graph.input] == ["input"]
    assert contractions(model) == ["1", "3"]
    others = {node.op_type: node.name for node in model.graph.node if node.op_type not in CONTRACTIONS}
    assert others["LayerNormalization"].partition("/")[0] == "layer_norm"
    assert others["Gelu"].partition("/")[0] == "gelu"
    assert off(run(model, x)[0], net(x)) < 1e-5


class Pools(nn.Module):
    """Two means, and between them a pool over whole pictures, of which torch makes another mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * x.mean((2, 3), keepdim=True).sigmoid()
        gated = scaled * nn.functional.adaptive_avg_pool2d(scaled, 1).relu()
        return gated.mean(1)


def test_a_pool_over_whole_pictures_is_called_as_in_the_trace() -> None:
    means = [node.name for node in onnx_from_module(Pools(), (X,)).graph.node if node.op_type == "ReduceMean"]
    assert means == ["mean/0", "adaptive_avg_pool2d/0", "mean_1/0"]


class Norm(nn.Module):
    """An RMS norm, of which torch makes a mean as well, and a mean behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed.mean((2, 3))


def test_no_mean_bears_the_name_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [node.name for node in onnx_from_module(Norm(), (X,)).graph.node if node.op_type == "ReduceMean"]
    assert len(names) == 2 and names[1] == "mean/0" and names[0] != "mean/0"
    monkeypatch.setattr("edgeprune.onnx_export.names_of_means", lambda program: ["mean"])  # one of two is known
    names = [node.name for node in onnx_from_module(Norm(), (X,)).graph.node if node.op_type == "ReduceMean"]
    assert names == ["decomposed_mean/0", "decomposed_mean_1/0"]
