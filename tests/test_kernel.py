"""Kernels: names, JSON, counts, and the ONNX model of each operator against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel

pytestmark = pytest.mark.unit

CONV = Kernel(
    operator="conv",
    c_in=32,
    c_out=64,
    spatial=(56, 56),
    window=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
    dilation=(1, 1),
    groups=2,
    epilogue=("bias", "relu"),
)


def test_key_is_readable() -> None:
    assert CONV.key == "conv 32>64 g2 b1 56x56 k3x3 s2x2 p1x1 d1x1 +bias+relu fp32 dense"


def test_json_round_trip_leaves_defaults_out() -> None:
    document = CONV.to_json()
    assert "batch" not in document
    assert Kernel.from_json(document) == CONV


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"operator": "conv", "c_in": 1, "c_out": 1, "colour": 1}, "unknown field 'colour'"),
        ({"operator": "conv", "c_in": "1", "c_out": 1}, "field 'c_in'"),
        ({"operator": "conv", "c_in": True, "c_out": 1}, "field 'c_in'"),
        ({"operator": "conv", "c_in": 1}, "lacks a field"),
        ({"operator": "conv", "c_in": 1, "c_out": 1, "spatial": [1.5]}, "expected a list of int"),
        ({"operator": "sort", "c_in": 1, "c_out": 1}, "'sort' is not one of"),
        ({"operator": "conv", "c_in": 3, "c_out": 4, "groups": 2}, "groups=2"),
    ],
)
def test_json_that_is_no_kernel(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Kernel.from_json(document)


def test_counts() -> None:
    assert CONV.spatial_out == (28, 28)
    assert CONV.macs == 64 * 16 * 9 * 28 * 28
    weights, inputs, outputs = 64 * 16 * 9, 32 * 56 * 56, 64 * 28 * 28
    assert CONV.num_bytes == 4 * (weights + inputs + outputs)
    assert Kernel(operator="linear", c_in=4, c_out=8, spatial=(10,)).macs == 320


def test_families() -> None:
    assert CONV.family == "grouped"
    shape: dict[str, Any] = {"operator": "conv", "spatial": (8, 8), "stride": (1, 1), "dilation": (1, 1)}
    assert Kernel(c_in=8, c_out=8, groups=8, window=(3, 3), padding=(1, 1), **shape).family == "depthwise"
    assert Kernel(c_in=8, c_out=8, window=(1, 1), padding=(0, 0), **shape).family == "pointwise"
    assert Kernel(operator="mean", c_in=8, c_out=8).family == "mean"


def test_counts_of_attention_and_matmul() -> None:
    attention = Kernel(operator="attention", c_in=24, c_out=12, groups=3, batch=2, spatial=(5, 9), epilogue=("add",))
    assert attention.key == "attention 24>12 g3 b2 5x9 +add fp32 dense"
    assert attention.macs == 2 * 3 * (5 * 8 * 9 + 5 * 9 * 4)
    assert attention.num_bytes == 4 * (2 * (5 + 9) * (24 + 12) + 2 * 5 * 12)
    matmul = Kernel(operator="matmul", c_in=24, c_out=12, groups=3, batch=2, spatial=(5,))
    assert matmul.macs == 2 * 3 * (5 * 8 * 4)
    assert matmul.num_bytes == 4 * 2 * 3 * (5 * 8 + 8 * 4 + 5 * 4)


@pytest.mark.parametrize(
    ("kernel", "sizes", "other", "widths"),
    [
        (CONV, (2, 16, 32), (4, 8, 8), (32, 32, 4)),
        (Kernel(operator="linear", c_in=6, c_out=4), (1, 6, 4), (1, 5, 3), (5, 3, 1)),
        (Kernel(operator="attention", c_in=24, c_out=12, groups=3, spatial=(5, 5)), (3, 8, 4), (2, 8, 2), (16, 4, 2)),
        (Kernel(operator="layer_norm", c_in=24, c_out=24, spatial=(5,)), (1, 24, 1), (1, 9, 1), (9, 9, 1)),
    ],
)
def test_sizes_are_what_latency_is_a_function_of(
    kernel: Kernel, sizes: tuple[int, int, int], other: tuple[int, int, int], widths: tuple[int, int, int]
) -> None:
    assert kernel.sizes == sizes
    assert kernel.resized(sizes) == kernel
    resized = kernel.resized(other)
    assert (resized.c_in, resized.c_out, resized.groups) == widths
    assert resized.sizes == other


def outcome(kernel: Kernel, *inputs: torch.Tensor) -> torch.Tensor:
    import onnx.checker
    import onnx.reference

    model = model_from_kernel(kernel, seed=1)
    onnx.checker.check_model(model, full_check=True)
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    (output,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    return torch.from_numpy(np.asarray(output))


def weights(kernel: Kernel) -> list[torch.Tensor]:
    import onnx.numpy_helper

    model = model_from_kernel(kernel, seed=1)
    return [torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer]


ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_that_of_torch(name: str) -> None:
    x = 4 * torch.randn(1, 6, 5, 5)
    kernel = Kernel(operator="activation", c_in=6, c_out=6, spatial=(5, 5), epilogue=(name,))
    torch.testing.assert_close(outcome(kernel, x), ACTIVATIONS[name](x), rtol=1e-5, atol=1e-5)


def test_convolution_is_that_of_torch() -> None:
    kernel = Kernel.from_json(CONV.to_json() | {"spatial": [9, 9], "epilogue": ["bias", "add", "relu"]})
    x, residual = torch.randn(1, 32, 9, 9), torch.randn(1, 64, 5, 5)
    weight, bias = weights(kernel)
    expected = torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride=2, padding=1, groups=2) + residual)
    torch.testing.assert_close(outcome(kernel, x, residual), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spatial", [(), (7,), (7, 5)])
def test_linear_is_that_of_torch(spatial: tuple[int, ...]) -> None:
    kernel = Kernel(operator="linear", c_in=12, c_out=8, spatial=spatial, epilogue=("bias",))
    x = torch.randn(1, *spatial, 12)
    weight, bias = weights(kernel)
    expected = x @ (weight if spatial else weight.mT) + bias
    torch.testing.assert_close(outcome(kernel, x), expected, rtol=1e-4, atol=1e-4)


def test_the_others_are_those_of_torch() -> None:
    x, other, gate = torch.randn(1, 6, 8, 8), torch.randn(1, 6, 8, 8), torch.randn(1, 6, 1, 1)
    size: dict[str, Any] = {"c_in": 6, "c_out": 6, "spatial": (8, 8)}
    pool: dict[str, Any] = {"window": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    functional = torch.nn.functional
    torch.testing.assert_close(outcome(Kernel(operator="add", **size), x, other), x + other)
    torch.testing.assert_close(outcome(Kernel(operator="mul", **size), x, gate), x * gate)
    torch.testing.assert_close(outcome(Kernel(operator="mean", **size), x), x.mean((2, 3), keepdim=True))
    pooled = functional.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(outcome(Kernel(operator="max_pool", **size, **pool), x), pooled)
    pooled = functional.avg_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(outcome(Kernel(operator="avg_pool", **size, **pool), x), pooled)
    joined = Kernel(operator="cat", c_in=13, c_out=13, spatial=(8, 8))
    both = (x, torch.randn(1, 7, 8, 8))
    torch.testing.assert_close(outcome(joined, *both), torch.cat(both, 1))
    affine = Kernel(operator="affine", **size)
    scale, shift = weights(affine)
    torch.testing.assert_close(outcome(affine, x), x * scale + shift)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_that_of_torch(biased: bool) -> None:
    kernel = Kernel(
        operator="attention", c_in=24, c_out=12, groups=3, batch=2, spatial=(5, 9), epilogue=("add",) if biased else ()
    )
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 12)
    bias = next((w for w in weights(kernel) if w.dim() == 4), None)
    assert (bias is not None) == biased
    q, k, v = (x.view(2, x.shape[1], 3, -1).transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(outcome(kernel, query, key, value), expected, rtol=1e-4, atol=1e-5)


def test_what_runs_beside_attention_is_that_of_torch() -> None:
    x, size = torch.randn(2, 7, 5, 6), dict[str, Any](batch=2, c_in=6, c_out=6, spatial=(7, 5))
    norm = Kernel(operator="layer_norm", **size)
    scale, shift = weights(norm)
    torch.testing.assert_close(outcome(norm, x), torch.nn.functional.layer_norm(x, (6,), scale, shift))
    torch.testing.assert_close(outcome(Kernel(operator="copy", **size), x), x.transpose(1, 2))
    channels_first = torch.randn(2, 6, 7, 5)
    last = outcome(Kernel(operator="transpose", **size), channels_first)
    torch.testing.assert_close(last, channels_first.permute(0, 2, 3, 1))
    softmax = outcome(Kernel(operator="softmax", **size), channels_first)
    torch.testing.assert_close(softmax, channels_first.softmax(-1))
    matmul = Kernel(operator="matmul", c_in=6, c_out=12, groups=3, batch=2, spatial=(5,))
    first, second = torch.randn(2, 3, 5, 2), torch.randn(2, 3, 2, 4)
    torch.testing.assert_close(outcome(matmul, first, second), first @ second)


def test_what_cannot_be_built_says_why() -> None:
    supported = r"\(supported: fp32, fp16, bf16, int8; dense, 2:4\)"
    with pytest.raises(ValueError, match=f"fp8 dense kernels are not built yet {supported}"):
        model_from_kernel(Kernel(operator="linear", c_in=4, c_out=4, precision="fp8"))
    with pytest.raises(ValueError, match="2:4"):
        model_from_kernel(Kernel(operator="linear", c_in=6, c_out=4, sparsity="2:4"))
    with pytest.raises(ValueError, match="unknown epilogue 'swizzle'"):
        model_from_kernel(Kernel(operator="add", c_in=4, c_out=4, epilogue=("swizzle",)))
    with pytest.raises(ValueError, match="names itself"):
        model_from_kernel(Kernel(operator="activation", c_in=4, c_out=4))
