"""Kernels in half precision and in the 2:4 pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import model_from_kernel, two_of_four
from tests.backends.test_contract import KERNELS, conv

pytest.importorskip("onnx")
pytestmark = pytest.mark.unit

CONV = conv(16, 24, "bias", "relu")
ROWS = Kernel(operator="linear", c_in=48, c_out=20, epilogue=("bias",))
TOKENS = replace(ROWS, spatial=(7,))


def weights_of(kernel: Kernel) -> np.ndarray[Any, Any]:
    """Of its contraction: the first tensor."""
    from onnx import numpy_helper

    weights: np.ndarray[Any, Any] = numpy_helper.to_array(model_from_kernel(kernel).graph.initializer[0])
    return weights


def test_two_of_four_keeps_the_largest() -> None:
    rows = np.array([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3]], np.float32)
    assert two_of_four(rows).tolist() == np.array([[0, -4, 3, 0, 0, 0, -0.4, 0.3]], np.float32).tolist()
    columns = np.array([[5.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0]], np.float32)
    assert two_of_four(columns, axis=0).tolist() == [[5, 0], [0, 0], [0, 3], [3, 4]]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_two_of_four_for_any_weights(c_out: int, groups: int, window: int, seed: int) -> None:
    """Of every four input channels at each output channel and kernel position two stay, ties and all."""
    drawn = np.random.default_rng(seed).integers(-3, 4, (c_out, 4 * groups, window, window)).astype(np.float32)
    sparse = two_of_four(drawn)
    fours = np.moveaxis(sparse, 1, -1).reshape(-1, 4)
    before = np.moveaxis(drawn, 1, -1).reshape(-1, 4)
    assert ((fours != 0).sum(1) <= 2).all()
    assert np.array_equal(np.where(fours != 0, before, 0), fours)
    assert np.allclose(np.abs(fours).sum(1), np.sort(np.abs(before), 1)[:, 2:].sum(1))


@pytest.mark.parametrize(("kernel", "axis"), [(CONV, 1), (ROWS, 1), (TOKENS, 0)], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sparse_kernels_have_the_pattern_along_their_input_channels(kernel: Kernel, axis: int, precision: str) -> None:
    dense = weights_of(replace(kernel, precision=precision))
    sparse = weights_of(replace(kernel, precision=precision, sparsity="2:4"))
    count = (np.moveaxis(sparse, axis, -1).reshape(-1, 4) != 0).sum(1)
    assert (count == 2).all()
    assert np.array_equal(sparse[sparse != 0], dense[sparse != 0])
    assert not ((np.moveaxis(dense, axis, -1).reshape(-1, 4) != 0).sum(1) == 2).all()  # the dense one has it not


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (conv(13, 29), "groups of four input channels"),
        (conv(24, 24, groups=24), "groups of four input channels"),
        (Kernel(operator="add", c_in=8, c_out=8, spatial=(4, 4)), "only conv and linear kernels have weights to make"),
        (Kernel(operator="attention", c_in=24, c_out=24, groups=3, spatial=(9, 9)), "only conv and linear"),
    ],
)
def test_what_cannot_be_sparse_is_refused(kernel: Kernel, words: str) -> None:
    with pytest.raises(ValueError, match=f"2:4.*{words}|{words}.*2:4"):
        model_from_kernel(replace(kernel, sparsity="2:4"))


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32 1:2 kernels are not built yet"):
        model_from_kernel(replace(CONV, sparsity="1:2"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.key)
def test_half_precision_through_and_through(kernel: Kernel) -> None:
    """Types check, nothing is float32 but an output that says so, and the values are those of fp32 to three digits."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    half, full = model_from_kernel(replace(kernel, precision="fp16")), model_from_kernel(kernel)
    onnx.checker.check_model(half, full_check=True)
    values = [*half.graph.input, *half.graph.output]
    assert {value.type.tensor_type.elem_type for value in values} == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in half.graph.initializer}
    rng = np.random.default_rng(0)
    feeds = {
        value.name: rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(np.float16)
        for value in half.graph.input
    }
    (found,) = map(np.asarray, ReferenceEvaluator(half).run(None, feeds))
    floats = {name: value.astype(np.float32) for name, value in feeds.items()}
    (wanted,) = map(np.asarray, ReferenceEvaluator(full).run(None, floats))
    assert np.abs(found.astype(np.float32) - wanted).max() <= 5e-3 * max(1.0, np.abs(wanted).max())
