"""A whole network in half precision: the same names, inputs and outputs, float16 between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import EdgepruneError
from edgeprune.onnx_export import onnx_from_module
from edgeprune.onnx_half import to_half
from tests.small_models import Net, redrawn

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.unit

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_network_in_half_precision_is_the_network() -> None:
    from onnx.reference import ReferenceEvaluator

    net = redrawn(Net()).eval()
    full = onnx_from_module(net, (X,))
    half = to_half(full)
    assert [node.name for node in half.graph.node][1:-1] == [node.name for node in full.graph.node]
    assert [value.SerializeToString() for value in half.graph.input] == [
        value.SerializeToString() for value in full.graph.input
    ]
    floats = {tensor.name for tensor in half.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert floats == set()
    (found,) = map(np.asarray, ReferenceEvaluator(half).run(None, {"x": X.numpy()}))
    wanted = net(X).detach().numpy()
    assert found.dtype == np.float32
    assert 1e-6 < np.abs(found - wanted).max() / np.abs(wanted).max() < 5e-3


def test_the_model_itself_stays() -> None:
    full = onnx_from_module(redrawn(Net()), (X,))
    before = full.SerializeToString(deterministic=True)
    to_half(full)
    assert full.SerializeToString(deterministic=True) == before


def test_scales_of_a_resize_stay_float() -> None:
    """ONNX takes them as float32 alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2))
    half = to_half(onnx_from_module(net, (X,)))
    onnx.checker.check_model(half, full_check=True)


def test_a_weight_beyond_half_precision_is_named() -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight[0, 0] = 1e6
    with pytest.raises(EdgepruneError, match="1e\\+06 is more than half precision holds, 65504"):
        to_half(onnx_from_module(net, (torch.zeros(2, 4),)))


def test_the_ends_of_float32_become_the_ends_of_half_precision() -> None:
    """What transformers add to the scores of tokens that are not there."""
    from onnx.reference import ReferenceEvaluator

    class Masked(nn.Module):
        def forward(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.where(mask > 0, scores, torch.finfo(torch.float32).min).softmax(-1)

    scores, mask = torch.tensor([[1.0, 2.0, 30.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    half = to_half(onnx_from_module(Masked(), (scores, mask)))
    (found,) = map(np.asarray, ReferenceEvaluator(half).run(None, {"scores": scores.numpy(), "mask": mask.numpy()}))
    np.testing.assert_allclose(found, [[0.2689, 0.7311, 0.0]], atol=1e-3)
