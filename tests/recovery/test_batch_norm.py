"""Batch norms: statistics by hand, and nothing changed where nothing is to be changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeprune.recovery.batch_norm import LEAST_SAMPLES, pair_moments, recalibrate
from edgeprune.recovery.reference import Moments

pytestmark = pytest.mark.unit


def moments_of(norm: nn.BatchNorm2d, x: torch.Tensor) -> Moments:
    assert norm.running_mean is not None and norm.running_var is not None
    by_channel = x.transpose(0, 1).flatten(1).double()
    return Moments(
        mean=by_channel.mean(1),
        var=by_channel.var(1, correction=0),
        running_mean=norm.running_mean.double(),
        running_var=norm.running_var.double(),
    )


def drawn_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3).eval()
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
        norm.weight.copy_(torch.tensor([1.0, -3.0, 0.1]))
        norm.bias.copy_(torch.tensor([0.0, 5.0, 2.0]))
    return norm


def test_a_shifted_and_scaled_input_is_undone() -> None:
    torch.manual_seed(0)
    norm = drawn_norm()
    x = torch.randn(5, 3, 4, 4) * 2 + 1
    expected = norm(x)
    dense = moments_of(norm, x)
    changed = x * torch.tensor([0.5, 2.0, 1.0])[:, None, None] + torch.tensor([3.0, 0.0, -7.0])[:, None, None]
    with torch.no_grad():
        pair_moments(norm, changed, dense)
        torch.testing.assert_close(norm(changed), expected, rtol=1e-4, atol=1e-4)


def test_the_dense_input_changes_nothing_however_few() -> None:
    norm = drawn_norm()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        pair_moments(norm, x, moments_of(norm, x))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)


def test_a_silent_channel_is_only_shifted() -> None:
    norm = drawn_norm()
    x = torch.randn(4, 3, 2, 2)
    dense = moments_of(norm, x)
    x[:, 1] = 6.0
    with torch.no_grad():
        pair_moments(norm, x, dense)
    assert norm.running_var is not None and norm.running_var[1] == pytest.approx(0.25, rel=1e-5)
    assert torch.isfinite(norm(x)).all()


def test_recalibration_is_the_average_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9)).eval()
    batches = [torch.randn(8, 3, 4, 4) + i for i in range(3)]
    result = recalibrate(model, batches)
    inputs = [model[0](x).transpose(0, 1).flatten(1) for x in batches]
    norm = result.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(
        norm.running_mean, torch.stack([x.mean(1) for x in inputs]).mean(0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(1) for x in inputs]).mean(0), rtol=1e-5, atol=1e-5)
    assert norm.momentum == 0.1 and not any(m.training for m in result.modules())
    assert model.get_submodule("1").running_mean.tolist() == [0.0] * 4  # type: ignore[operator]


def test_too_few_samples_leave_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    result = recalibrate(model, [torch.randn(LEAST_SAMPLES - 1, 3, 2, 2)])
    assert result[0].running_mean.tolist() == [0.0] * 3  # type: ignore[index]
