"""Whole networks in QDQ form: where integers stand, that the runtime runs them as such, that the answers stay close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgeprune as ep
from edgeprune import onnx_int8
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.exporting import as_pruned, check_calibration, export, export_dense
from edgeprune.measurement import HOT
from edgeprune.onnx_equivalents import gemms_for_linears, pools_for_means
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import halve_weights, to_half
from edgeprune.onnx_quantise import ONNXRUNTIME, TENSORRT, attention_nodes, quantise, quantise_lookups
from edgeprune.parity import check_parity, samples
from edgeprune.precision import shares_of
from edgeprune.ranges import batches_of, drawn_batches
from edgeprune.transport import open_session

Require = Callable[[str], None]
pytestmark = [pytest.mark.integration, pytest.mark.timed]
X = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


class Residual(nn.Module):
    """A residual block, a mean, a linear head: what convolutional networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.second(self.first(x).relu()) + x).relu()
        return torch.as_tensor(self.head(x.mean((2, 3))))


class Attention(nn.Module):
    """One head over 4 tokens, with a projection before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) / 3.0).softmax(-1)
        return torch.as_tensor(self.out(weights @ v))


class Stream(nn.Module):
    """The multilayer perceptron of a transformer; its residual stream is 200 times as large at one token's index."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(16),
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            nn.Linear(16, 16),
        )
        self.last = nn.LayerNorm(16)
        self.peak = nn.Parameter(
            torch.zeros(1, 8, 16).index_fill(2, torch.tensor(3), 200.0) * (torch.arange(8) == 0)[:, None]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.peak
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return torch.as_tensor(self.head(self.last(x)))


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def floats(residual: nn.Module) -> onnx.ModelProto:
    return onnx_from_module(residual, X)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def initial(model: onnx.ModelProto) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_onnx_runtimes_form_has_unsigned_activations_and_whole_biases(floats: onnx.ModelProto) -> None:
    model = quantise(floats, drawn_batches(X), onnx_int8.ONNXRUNTIME, ONNXRUNTIME)
    values = initial(model)
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {values[name].dtype.name for name in zeros} == {"uint8"}
    assert values["stem.weight_quantized"].dtype == np.int8 and values["stem.weight_scale"].shape == (16,)
    assert values["stem.bias_quantized"].dtype == np.int32
    assert [value.type.tensor_type.elem_type for value in model.graph.output] == [onnx.TensorProto.FLOAT]


def test_tensorrts_form_is_symmetric_and_quantises_inputs_alone(floats: onnx.ModelProto) -> None:
    model = quantise(floats, drawn_batches(X), onnx_int8.TENSORRT, TENSORRT)
    values = initial(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any()
    givers = {name: node.op_type for node in model.graph.node for name in node.output}
    readers = Counter(r.op_type for node in model.graph.node for r in [node] for name in node.input if "stem" in name)
    assert readers["QuantizeLinear"]
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert [givers[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert node.input[2] in values and values[node.input[2]].dtype == np.float32, "a bias stays float"
        if node.op_type == "Relu":
            assert givers[node.input[0]] in ("Conv", "Add"), "nothing between what TensorRT fuses"
    add = next(node for node in model.graph.node if node.op_type == "Add")
    assert sorted(givers[name] for name in add.input) == ["Conv", "DequantizeLinear"]


def test_half_precision_around_integers_keeps_scales_that_reach_the_largest_value(floats: onnx.ModelProto) -> None:
    model = quantise(floats, drawn_batches(X), onnx_int8.TENSORRT, TENSORRT)
    half = to_half(model)
    before, after = initial(model), initial(half)
    scales = {node.input[1] for node in half.graph.node if node.op_type == "QuantizeLinear"}
    for name in scales:
        assert after[name].dtype == np.float16
        assert np.all(after[name].astype(np.float64) >= before[name].astype(np.float64))
        np.testing.assert_allclose(after[name].astype(np.float64), before[name].astype(np.float64), rtol=2e-3)
    onnx.checker.check_model(half)


def test_a_scale_too_small_for_half_precision_does_not_become_zero() -> None:
    tiny = onnx.numpy_helper.from_array(np.array(1e-9, np.float32), "s")
    zero = onnx.numpy_helper.from_array(np.array(0, np.int8), "z")
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [tiny, zero],
    )
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert initial(half)["s"] == np.float16(6e-8)


def test_attention_stays_float_and_its_projections_do_not() -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 8),)
    model = onnx_from_module(Attention().eval(), x)
    named = {node.name: node.op_type for node in model.graph.node}
    found = Counter(named[name] for name in attention_nodes(model))
    assert found["Softmax"] == 1 and found["MatMul"] == 2
    made = quantise(model, drawn_batches(x), onnx_int8.ONNXRUNTIME, ONNXRUNTIME)
    givers = {name: node.op_type for node in made.graph.node for name in node.output}
    softmax = next(node for node in made.graph.node if node.op_type == "Softmax")
    assert givers[softmax.input[0]] != "DequantizeLinear"
    weights = [name for name, value in initial(made).items() if value.dtype == np.int8 and value.ndim == 2]
    assert len(weights) == 2, "both projections"


def answers(model: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {model.graph.input[0].name: x.numpy()}))


def test_a_linear_becomes_one_gemm_with_its_bias_of_the_same_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16)
    model = onnx_from_module(Stream().eval(), (x,))
    found = gemms_for_linears(model)
    assert kinds(model)["MatMul"] == 3 and kinds(found)["MatMul"] == 0 and kinds(found)["Gemm"] == 3
    assert kinds(model)["Add"] - kinds(found)["Add"] == 3, "the biases"
    onnx.checker.check_model(found, full_check=True)
    np.testing.assert_allclose(answers(found, x)[0], answers(model, x)[0], rtol=1e-5, atol=1e-6)


def test_linears_in_a_row_stay_in_two_dimensions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model = onnx_from_module(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval(), (x,))
    found = gemms_for_linears(model)
    onnx.checker.check_model(found, full_check=True)
    assert kinds(found)["Gemm"] == 2
    np.testing.assert_allclose(answers(found, x)[0], answers(model, x)[0], rtol=1e-5, atol=1e-6)


class Lookups(nn.Module):
    """A table of words, a small one of positions, and a table that is the last layer's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tied = nn.Embedding(1000, 32), nn.Embedding(900, 32)
        self.places = nn.Embedding(10, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.tied(ids) + self.places(ids % 10))
        return nn.functional.linear(x, self.tied.weight)


def test_embeddings_are_looked_up_as_integers_where_nothing_else_reads_them() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 900, (1, 12))
    model = onnx_from_module(Lookups().eval(), (ids,))
    found = quantise_lookups(model)
    onnx.checker.check_model(found, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    assert types["words.weight"] == onnx.TensorProto.INT8
    assert types["places.weight"] == types["tied.weight"] == onnx.TensorProto.FLOAT
    assert model.ByteSize() - found.ByteSize() == pytest.approx(1000 * 32 * 3, rel=0.02), "a byte instead of four"
    a, b = answers(found, ids)[0], answers(model, ids)[0]
    assert 0 < np.abs(a - b).max() / np.abs(b).max() < 0.01
    assert [n.name for n in found.graph.node if n.op_type == "Gather"] == [
        n.name for n in model.graph.node if n.op_type == "Gather"
    ]


class NoBias(nn.Module):
    """Sums behind a matmul that are no bias of a linear, and a matmul that is an output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.third = nn.Linear(8, 6, bias=False)
        self.one, self.whole = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(5, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        between = self.third(x)
        return self.first(x) + self.one, self.second(x) + self.whole, between, between + self.bias


def test_what_is_no_linear_with_a_bias_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = onnx_from_module(NoBias().eval(), (torch.randn(2, 5, 8),))
    assert kinds(gemms_for_linears(model)) == kinds(model) and kinds(model)["MatMul"] == 3


class Rms(nn.Module):
    """An RMS norm written out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16), Rms(), nn.Identity(), nn.Sigmoid()])
def test_graph_and_onnx_agree_on_whether_there_is_a_layer_norm(norm: nn.Module) -> None:
    from edgeprune.graph import trace
    from edgeprune.layer_norms import has_layer_norm, has_layer_norm_in_module, has_layer_norm_in_onnx

    net = nn.Sequential(nn.Linear(16, 16), norm, nn.Linear(16, 4)).eval()
    x = (torch.randn(1, 5, 16),)
    wanted = not isinstance(norm, nn.Identity | nn.Sigmoid)
    assert has_layer_norm(trace(net, x)) == wanted
    assert has_layer_norm_in_module(net, x) == wanted
    assert has_layer_norm_in_onnx(onnx_from_module(net, x)) == wanted


class Scores(nn.Module):
    """A product of activations that is no attention, behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.norm(x))
        return x @ x.transpose(1, 2)


def test_beside_layer_norms_a_product_of_activations_is_float_as_its_unit_says() -> None:
    from edgeprune.backends import find_backend
    from edgeprune.backends.onnxruntime.quantising import quantised
    from edgeprune.graph import trace

    torch.manual_seed(0)
    x = (torch.randn(1, 5, 16),)
    units = find_backend("onnxruntime").partition(trace(Scores().eval(), x), "int8")
    assert {u.dense.operator: u.dense.precision for u in units if u.dense.operator in ("linear", "matmul")} == {
        "linear": "int8",
        "matmul": "fp32",
    }
    model = quantised(onnx_from_module(Scores().eval(), x), drawn_batches(x))
    givers = {name: node.op_type for node in model.graph.node for name in node.output}
    (matmul,) = (node for node in model.graph.node if node.op_type == "MatMul")
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    assert "DequantizeLinear" not in [givers.get(name) for name in matmul.input]
    assert [givers[name] for name in gemm.input] == ["DequantizeLinear"] * 3


def test_onnx_runtime_leaves_the_residual_stream_of_a_transformer_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 16),)
    given = as_pruned(Stream().eval(), x)
    device = ep.load_device("host-onnxruntime")
    engine = export(given, device, tmp_path / "e", precision="int8", calibration=drawn_batches(x, count=8))
    with open_session(device, precision="int8") as session:
        session.load("e", engine.path, profile=True)
        found = check_parity(session, "e", engine, samples(given, calibration=engine.calibration))
        session.measure(["e"], timing=HOT)
        times = session.node_times("e")
    assert times is not None
    ran = Counter((node["type"], node["precision"]) for node in times.nodes)
    assert ran["QGemm", "int8"] == 3 and not any("Add" in kind for kind, precision in ran if precision == "int8")
    assert found.error < 0.05, "a stream in 255 steps would leave little of all other values"
    everything = quantise(
        gemms_for_linears(onnx_from_module(given.module, x)), engine.calibration, onnx_int8.ONNXRUNTIME, ONNXRUNTIME
    )
    path = tmp_path / "everything.onnx"
    path.write_bytes(everything.SerializeToString())
    with open_session(device, precision="int8") as session:
        session.load("e", path)
        (wanted,) = samples(given, calibration=engine.calibration)[0].outputs
        (wrong,) = session.run("e", [engine.calibration[0][0].numpy()])
    assert np.abs(wrong - wanted).max() / np.abs(wanted).max() > 0.1


def test_a_mean_over_a_picture_becomes_a_pool_of_the_same_values(floats: onnx.ModelProto) -> None:
    import onnxruntime

    pooled = pools_for_means(floats)
    assert kinds(floats)["ReduceMean"] == 1 and kinds(pooled)["ReduceMean"] == 0
    assert kinds(pooled)["GlobalAveragePool"] == 1
    feed = {floats.graph.input[0].name: X[0].numpy()}
    a, b = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for model in (floats, pooled)
    )
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weights_stored_in_half_are_half_the_file_and_computed_in_float(
    residual: nn.Module, floats: onnx.ModelProto, tmp_path: Path
) -> None:
    device = ep.load_device("host-onnxruntime")
    engine = export(as_pruned(residual, X), device, tmp_path / "half", weights="fp16")
    assert engine.notes["weights"] == "fp16"
    assert halve_weights(floats).ByteSize() < 0.65 * floats.ByteSize()
    with open_session(device) as session:
        session.load("half", engine.path, profile=True)
        assert check_parity(session, "half", engine, samples(as_pruned(residual, X))).error < 1e-2
        session.measure(["half"], timing=HOT)
        assert shares_of(session.node_times("half")) == {"fp32": 1.0}


@pytest.mark.parametrize(
    ("name", "integers"),
    [("host-openvino", {"Convolution": 3}), ("host-onnxruntime", {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1})],
)
def test_the_runtime_executes_integers_and_answers_as_torch_does(
    name: str, integers: dict[str, int], residual: nn.Module, require: Require, tmp_path: Path
) -> None:
    require(name.removeprefix("host-"))
    if name == "host-openvino":
        pytest.importorskip("nncf")
    device = ep.load_device(name)
    engine = export(
        as_pruned(residual, X), device, tmp_path / "e", precision="int8", calibration=drawn_batches(X, count=8)
    )
    assert engine.notes["weights"] == "int8" and "8 batches" in engine.notes["quantised by"]
    with open_session(device, precision="int8") as session:
        session.load("e", engine.path, profile=True)
        found = check_parity(session, "e", engine, samples(as_pruned(residual, X), calibration=engine.calibration))
        assert 0 < found.error < 0.1, "integers, and the right ones"
        session.measure(["e"], timing=HOT)
        times = session.node_times("e")
    assert times is not None
    ran = Counter(node["type"] for node in times.nodes if node["precision"] == "int8")
    assert integers.items() <= ran.items()
    assert (shares_of(times) or {})["int8"] > 0.8
    names = {name for node in times.nodes for name in (node.get("covers") or [node["name"]])}
    assert {"stem", "first", "second"} <= {name.partition("/")[0] for name in names}, "times find their modules"


@pytest.mark.parametrize("name", ["host-openvino", "host-onnxruntime"])
def test_sums_of_the_largest_products_do_not_saturate(name: str, require: Require, tmp_path: Path) -> None:
    """Without VNNI, a CPU adds two products of 8 bits in 16: twice 255 x 127 does not fit, twice 255 x 64 does."""
    require(name.removeprefix("host-"))
    if name == "host-openvino":
        pytest.importorskip("nncf")
    net = nn.Sequential(nn.Conv2d(1, 64, 1, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    ones = (torch.ones(1, 1, 8, 8),)
    given = as_pruned(net.eval(), ones)
    device = ep.load_device(name)
    engine = export(given, device, tmp_path / "e", precision="int8", calibration=[ones])
    with open_session(device, precision="int8") as session:
        session.load("e", engine.path)
        (found,) = session.run("e", [ones[0].numpy()])
    np.testing.assert_allclose(found, 64.0, rtol=0.02)


def test_no_calibration_and_other_shapes_are_refused_by_name(residual: nn.Module, tmp_path: Path) -> None:
    device = ep.load_device("host-onnxruntime")
    with pytest.raises(InputError, match="int8 needs calibration data, .* --data"):
        export_dense(residual, X, device, tmp_path / "e", precision="int8")
    with pytest.raises(
        InputError, match=r"batch 1 holds float32 \(1, 3, 8, 8\), the model takes float32 \(1, 3, 16, 16\)"
    ):
        batches = (X, (torch.zeros(1, 3, 8, 8),))
        export_dense(residual, X, device, tmp_path / "e", precision="int8", calibration=batches)
    with pytest.raises(InputError, match="has no precision 'int8'"):
        export_dense(residual, X, ep.load_device("null"), tmp_path / "e", precision="int8", calibration=(X,))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_quantising_leaves_nothing(
    residual: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime import quantization

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantization, "quantize_static", interrupt)
    with pytest.raises(KeyboardInterrupt):
        device = ep.load_device("host-onnxruntime")
        export_dense(residual, X, device, tmp_path / "e", precision="int8", calibration=drawn_batches(X))
    assert list(tmp_path.iterdir()) == []


def test_half_precision_that_no_cpu_computes_is_refused_with_what_there_is(tmp_path: Path, residual: nn.Module) -> None:
    with pytest.raises(InputError, match=r"no precision 'fp16' \(known: fp32, bf16, int8\); .* `export --store fp16`"):
        export_dense(residual, X, ep.load_device("host-openvino"), tmp_path / "e", precision="fp16")


def test_a_quantiser_that_fails_is_told_in_its_words(floats: onnx.ModelProto) -> None:
    nameless = ((torch.zeros(1, 3, 5),),)
    with pytest.raises(EdgepruneError, match="onnxruntime can't quantise the model: .+"):
        quantise(floats, nameless, onnx_int8.ONNXRUNTIME, ONNXRUNTIME)


def test_batches_are_whole_and_of_the_traced_size() -> None:
    from edgeprune.data import synthetic

    example = (torch.zeros(4, 3, 8, 8), torch.ones(4))
    found = batches_of(synthetic((4, 3, 8, 8), count=10), example)
    assert [tuple(tensor.shape for tensor in batch) for batch in found] == [((4, 3, 8, 8), (4,))] * 2
    with pytest.raises(InputError, match="3 random samples don't fill one batch of 4"):
        batches_of(synthetic((4, 3, 8, 8), count=3), example)
    check_calibration(as_pruned(nn.Identity(), example), "fp32", (), ep.backends.find_backend("onnxruntime"))
    check_calibration(as_pruned(nn.Identity(), example), "int8", (), ep.backends.find_backend("null"))
