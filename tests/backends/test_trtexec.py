"""TensorRT's runner for trtexec: flags of each dialect, and what it makes of files good and bad.

Logs are quoted (`trtexec_logs.py`); files of times and profiles are *synthetic*, written from the form in
https://github.com/NVIDIA/TensorRT/blob/main/samples/common/sampleReporting.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.backends.tensorrt import partition, runner, runner_onnx, runner_output
from edgeprune.backends.tensorrt.runner import Handle, Trtexec, build_arguments, run_arguments
from edgeprune.backends.tensorrt.runner_output import covered, parse_times
from edgeprune.graph import analyse, tracing
from edgeprune.kernel_onnx import model_from_kernel
from tests.backends.test_contract import KERNELS
from tests.backends.trtexec_logs import BANNERS, LAYER_INFO, OUT_OF_MEMORY, SPARSE_NONE, SPARSE_PICKED

pytestmark = pytest.mark.unit

OLD = "--buildOnly --fp16 --noDataTransfers --useCudaGraph --useSpinWait --separateProfileRun"
TEN = "--skipInference --fp16 --stronglyTyped --noDataTransfers --useCudaGraph --useSpinWait --separateProfileRun"
ELEVEN = (
    "--skipInference --stronglyTyped --includeDataTransfers --noCudaGraph --noSpinWait --useCudaGraph --useSpinWait"
)
DIALECTS = {
    "8.5": Trtexec("trtexec", (8, 5, 2), frozenset(OLD.split())),
    "10.3": Trtexec("trtexec", (10, 3, 0), frozenset(TEN.split())),
    "11.1": Trtexec("trtexec", (11, 1, 0), frozenset(ELEVEN.split())),
}
ALWAYS = {"--profilingVerbosity=detailed", "--noTF32", "--sparsity=enable"}


def handle(**options: Any) -> Handle:
    model = {"inputs": [{"name": "x", "dtype": "float32", "shape": [1, 2]}], "outputs": [], "nodes": []}
    return Handle("/engine", {"precision": "fp16", **options}, model)


def test_partition_is_nvidias_catalogue_of_fusions() -> None:
    """https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/fusion-catalog.html: ReLU, Clip and a residual
    add go into the convolution; SiLU stays a pointwise kernel; GELU goes in in half precision."""
    graph = analyse(tracing.trace_program(Activations(), (torch.zeros(1, 4, 8, 8),)))
    keys = {
        precision: [unit.dense.key.replace(f" {precision} dense", "") for unit in partition(graph, precision)]
        for precision in ("fp32", "fp16")
    }
    convolution = "conv 4>4 g1 b1 8x8 k1x1 s1x1 p0x0 d1x1 +bias"
    assert keys["fp32"] == [
        *(f"{convolution}+relu6", convolution, "activation 4>4 g1 b1 8x8 +silu"),
        *(convolution, "activation 4>4 g1 b1 8x8 +gelu", f"{convolution}+add+relu"),
    ]
    assert keys["fp16"] == [
        *(f"{convolution}+relu6", convolution, "activation 4>4 g1 b1 8x8 +silu"),
        *(f"{convolution}+gelu", f"{convolution}+add+relu"),
    ]


class Activations(nn.Module):
    """ReLU6, SiLU, GELU, residual add and ReLU, each after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.b(nn.functional.relu6(self.a(x))))
        return torch.relu(self.d(nn.functional.gelu(self.c(y))) + x)


@pytest.mark.parametrize(("banner", "version"), BANNERS.items())
def test_quoted_banners_tell_their_version(banner: str, version: tuple[int, int, int]) -> None:
    assert runner_output.parse_version(banner) == version


@pytest.mark.parametrize(
    ("told", "version"), [("v8601", (8, 6, 1)), ("v101303] [b9", (10, 13, 3)), ("v110100] [b106", (11, 1, 0))]
)
def test_numbers_of_other_versions(told: str, version: tuple[int, int, int]) -> None:
    assert runner_output.parse_version(f"&&&& RUNNING TensorRT.trtexec [TensorRT {told}] # trtexec --help") == version


@pytest.mark.parametrize(
    ("dialect", "precision", "own"),
    [
        ("8.5", "fp32", {"--buildOnly"}),
        ("8.5", "fp16", {"--buildOnly", "--fp16"}),
        ("10.3", "fp32", {"--skipInference", "--stronglyTyped"}),
        ("10.3", "fp16", {"--skipInference", "--stronglyTyped"}),
        ("11.1", "fp16", {"--skipInference"}),
        ("8.5", "int8", {"--buildOnly", "--int8", "--fp16"}),
        ("10.3", "int8", {"--skipInference", "--stronglyTyped"}),
    ],
)
def test_flags_that_build(dialect: str, precision: str, own: set[str]) -> None:
    arguments = build_arguments(DIALECTS[dialect], handle(precision=precision), "kernel.onnx")
    files = {"--onnx", "--saveEngine", "--exportLayerInfo", "--timingCacheFile"}
    assert {argument for argument in arguments if argument.partition("=")[0] not in files} == ALWAYS | own


@pytest.mark.parametrize(
    ("dialect", "graph", "own"),
    [
        ("8.5", True, ["--useSpinWait", "--useCudaGraph"]),
        ("8.5", False, ["--useSpinWait"]),
        ("10.3", True, ["--useSpinWait", "--useCudaGraph"]),
        ("11.1", True, ["--includeDataTransfers"]),
        ("11.1", False, ["--includeDataTransfers", "--noCudaGraph"]),
    ],
)
def test_flags_that_run_time_the_same_in_every_dialect(dialect: str, graph: bool, own: list[str]) -> None:
    """Transfers inside, spinning, and a CUDA graph as asked for: 11.x turned all three defaults over."""
    arguments = run_arguments(DIALECTS[dialect], handle(cuda_graph=graph), 52, 200)
    engine = ["--loadEngine=/engine/model.engine", "--iterations=52", "--warmUp=200", "--duration=0"]
    assert arguments == engine + own


def test_inputs_are_named_with_their_files() -> None:
    given = handle()
    given.given = {0: "/engine/in0.bin"}
    assert run_arguments(DIALECTS["10.3"], given, 1, 0)[-1] == "--loadInputs=x:/engine/in0.bin"


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision bf16 is not supported; fp32, fp16, int8 are"):
        build_arguments(DIALECTS["10.3"], handle(precision="bf16"), "kernel.onnx")


@pytest.mark.parametrize(
    ("told", "precision"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Float", "fp32"),
        ("Half", "fp16"),
        ("Int32", None),
    ],
)
def test_the_precision_of_a_layer_is_that_of_its_first_input(told: str, precision: str | None) -> None:
    """In the words of 8.x and of 10.x; which layer computes in what is told nowhere else."""
    assert runner_output.precision_of({"Inputs": [{"Name": "x", "Format/Datatype": told}], "Outputs": []}) == precision
    assert runner_output.precision_of({"Inputs": []}) is None and runner_output.precision_of({}) is None


def run_of(h2d: float, compute: float, d2h: float, latency: float) -> dict[str, float]:
    return {"startEnqMs": 200.1, "h2dMs": h2d, "computeMs": compute, "d2hMs": d2h, "latencyMs": latency}


def test_latency_is_with_transfers_and_compute_beside_it() -> None:
    latency_ms, compute_ms = parse_times([run_of(0.25, 1.5, 0.125, 1.875), run_of(0.25, 1.0, 0.25, 1.5)])
    assert latency_ms == [1.875, 1.5]
    assert compute_ms == [1.5, 1.0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (run_of(0.25, 1.5, 0.125, 1.5), "not H2D \\+ compute \\+ D2H"),
        (run_of(0.0, 0.0, 0.0, 0.0), "not positive"),
        (run_of(0.0, -1.0, 0.0, 1.0), "not positive"),
        (run_of(0.0, float("inf"), 0.0, float("inf")), "not positive"),
        ({"latencyMs": 1.0}, "documented form"),
        ("latency", "documented form"),
        (run_of(0.0, 1.0, 0.0, 1.0) | {"h2dMs": None}, "documented form"),
    ],
)
def test_times_that_are_none(entry: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        parse_times([entry])


@pytest.mark.parametrize(
    "text", ["", "[", '[{"latencyMs" : nan}]', '[{"latencyMs": NaN}]', '[{"latencyMs": Infinity}]']
)
def test_a_file_that_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(RuntimeError, match="trtexec's times.json can't be read: "):
        runner_output.read_json(str(path))


def test_a_profile_with_the_layers_quoted(tmp_path: Path) -> None:
    """Reformatting is no compute; the nodes that went into a layer are read off its name."""
    (tmp_path / "layers.json").write_text(LAYER_INFO)
    layers = runner_output.layers_by_name(str(tmp_path / "layers.json"))
    reformat, convolution = layers
    profile: Any = [
        {"count": 50},
        {"name": reformat, "timeMs": 0.4, "averageMs": 0.008, "medianMs": 0.0075, "percentage": 20},
        {"name": convolution, "timeMs": 1.6, "averageMs": 0.032, "percentage": 80},  # no median before 8.4
    ]
    named = ["resnetv15_conv0_fwd", "resnetv15_batchnorm0_fwd", "resnetv15_relu0_fwd", "resnetv15_pool0_fwd", "fc"]
    first, second = runner_output.parse_profile(profile, layers, named)
    assert (first["type"], first["time_us"], first["compute"]) == ("Reformat", 7.5, False)
    assert (second["type"], second["time_us"], second["compute"]) == ("CaskConvActPool", 32.0, True)
    assert second["covers"] == named[:4]


@pytest.mark.parametrize("entry", [{"name": "a"}, {"averageMs": 1.0}, {"name": "a", "averageMs": -1.0}, 3])
def test_a_profile_that_is_none(entry: Any) -> None:
    with pytest.raises(RuntimeError, match="trtexec"):
        runner_output.parse_profile([{"count": 1}, entry], {}, [])


@pytest.mark.parametrize(
    ("name", "metadata", "nodes"),
    [
        ("a + b", "", ["a", "b"]),
        ("a || b", "", ["a", "b"]),
        ("PWN(b, c)", "", ["b", "c"]),
        ("PWN(PWN(a), b)", "", ["a", "b"]),
        ("{ForeignNode[a...c]}", "", ["a", "b", "c"]),
        ("__myl_MulAdd_myl0_1", "[ONNX Layer: c]\x1e[ONNX Layer: d]", ["c", "d"]),
        ("Reformatting CopyNode for Output Tensor 0", "", []),
        ("e", "", []),
    ],
)
def test_nodes_that_went_into_a_layer(name: str, metadata: str, nodes: list[str]) -> None:
    assert covered(name, metadata, ["a", "b", "c", "d"]) == nodes


def test_proof_of_a_sparse_tactic() -> None:
    assert runner_output.sparse_layers(SPARSE_PICKED) == ["conv2", "conv3"]
    assert runner_output.sparse_layers(SPARSE_NONE) == []
    assert runner_output.sparse_layers("[I] Engine built in 31.1935 sec.") is None


def test_proof_of_a_sparse_tactic_in_the_words_of_10() -> None:
    """Synthetic: no document of NVIDIA's quotes these lines."""
    assert runner_output.sparse_layers("[V] [TRT] (Sparsity) Chose 2 layer(s) using sparse tactics: a, b + c") == [
        "a",
        "b + c",
    ]
    assert runner_output.sparse_layers("[V] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics") == []
    assert runner_output.sparse_layers("[V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics") == ["?"]


def test_failures_say_what_trtexec_says() -> None:
    assert runner_output.failure(OUT_OF_MEMORY, 1).startswith("out of memory: 2: [virtualMemoryBuffer.cpp")
    assert runner_output.failure("[I] loading\n", -11) == "trtexec was ended by SIGSEGV: [I] loading"
    assert runner_output.failure("", 1) == "it printed nothing"
    # synthetic, after trtexec.cpp
    unknown = "[E] Unknown option: --workspace 2048\n[E] Unknown option: --buildOnly \n"
    assert runner_output.failure(unknown, 1) == "Unknown option: --workspace 2048; Unknown option: --buildOnly"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
def test_onnx_is_read_without_its_package(kernel: Any, tmp_path: Path) -> None:
    from edgeprune.engine import specs_of_onnx

    model = model_from_kernel(kernel)
    path = tmp_path / "kernel.onnx"
    path.write_bytes(model.SerializeToString())
    read = runner_onnx.read_onnx(str(path))
    for found, wanted in ((read["inputs"], model.graph.input), (read["outputs"], model.graph.output)):
        specs = specs_of_onnx(wanted)
        assert found == [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]
    assert read["nodes"] == [node.name for node in model.graph.node]


@pytest.mark.parametrize("data", [b"", b"this is no model", b"\x3a\x05ab", b"\x3a\x7f", b"\xff" * 20])
def test_what_is_no_onnx(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="not an ONNX model with static shapes: broken.onnx"):
        runner_onnx.read_onnx(str(tmp_path / "broken.onnx"))


def test_a_dynamic_dimension_is_refused(tmp_path: Path) -> None:
    model = model_from_kernel(KERNELS[0])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    (tmp_path / "dynamic.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="static shapes"):
        runner_onnx.read_onnx(str(tmp_path / "dynamic.onnx"))


def test_random_inputs_have_the_size_of_their_type(tmp_path: Path) -> None:
    for dtype, size in (("float32", 4), ("float16", 2), ("int64", 8), ("bool", 1)):
        given = handle()
        given.folder = str(tmp_path)
        given.model["inputs"][0] = {"name": "x", "dtype": dtype, "shape": [3, 5]}
        runner.fill(given, 0)
        assert Path(given.given[0]).stat().st_size == 15 * size
    assert json.dumps(runner.notes(given)) == '{"sparse": null, "sparse_layers": null}'
