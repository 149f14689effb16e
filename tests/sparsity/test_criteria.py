"""Which two of every four stay: magnitude, Wanda, SparseGPT, by hand and beside every possible mask."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.kernel_onnx import two_of_four
from edgeprune.pattern import best_mask, holds, mask_by_magnitude, matrix_of, share_of_groups, weight_of
from edgeprune.sparsity.gram import gram_of, output_error, rows_of
from edgeprune.sparsity.magnitude import magnitude
from edgeprune.sparsity.sparsegpt import sparsegpt
from edgeprune.sparsity.wanda import wanda

pytestmark = pytest.mark.unit


def correlated(columns: int, rows: int = 256, seed: int = 0) -> torch.Tensor:
    """H of inputs that share a few causes, as neighbouring channels of a network do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 2, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(rows, columns // 2, generator=generator, dtype=torch.float64) @ mixing
    X += 0.1 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return X.T @ X / rows


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_two_largest_of_every_four_stay() -> None:
    W = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 0.5, 0.5, 0.5]])
    new, mask = magnitude(W)
    assert new.tolist() == [[0, -4, 3, 0, 0.5, 0.5, 0, 0]]  # ties: the lower column
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]


def test_one_of_two_is_a_pattern_too() -> None:
    assert magnitude(torch.tensor([[1.0, 2.0, 4.0, 3.0]]), n=1, m=2)[0].tolist() == [[0, 2, 4, 0]]


def test_a_ragged_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="6 columns are no multiple of 4"):
        best_mask(torch.ones(1, 6))


def test_groups_lie_along_the_input_channels_of_each_kernel_position() -> None:
    weight = torch.randn(3, 8, 2, 2)
    matrix = matrix_of(weight)
    assert matrix.shape == (3, 32)
    assert matrix[1, 8:16].equal(weight[1, :, 0, 1])  # second position, all input channels
    assert weight_of(matrix, weight.shape).equal(weight)
    masked = weight_of(magnitude(matrix)[0], weight.shape)
    assert holds(masked) and not holds(weight)
    assert torch.unique((masked != 0).sum(1)).tolist() == [4]
    assert masked.numpy().tolist() == two_of_four(weight.numpy()).tolist()  # as kernels are measured


def test_share_of_groups_tells_part_of_a_pattern() -> None:
    weight = torch.ones(2, 8)
    weight[0, :2] = 0
    weight[1, 4:] = 0
    assert share_of_groups(weight) == 0.5
    assert share_of_groups(torch.zeros(2, 6)) == 0.0


def test_masks_are_set_in_place_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    before = module.get_parameter("1.weight").clone()
    mask_by_magnitude(module, {"0.weight": "2:4", "1.weight": "dense", "gone.weight": "2:4"})
    assert holds(module.get_parameter("0.weight")) and module.get_parameter("1.weight").equal(before)


def test_wanda_weighs_by_the_norm_of_the_inputs() -> None:
    W = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    H = torch.diag(torch.tensor([1.0, 1.0, 4.0, 100.0]))  # norms 1, 1, 2, 10
    assert wanda(W, H)[1].tolist() == [[True, False, False, True]]  # scores 4, 3, 4, 10; ties: the lower column
    assert magnitude(W)[1].tolist() == [[True, True, False, False]]


def test_with_uncorrelated_inputs_sparsegpt_keeps_what_wanda_keeps_and_updates_nothing() -> None:
    W, H = weights(4, 16), torch.diag(torch.arange(1.0, 17.0, dtype=torch.float64))
    H[3, 3] = 1e-3
    new, mask = sparsegpt(W, H)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(16)
    assert mask.equal(wanda(W, damped)[1])
    assert torch.allclose(new, W * mask)


def test_sparsegpt_of_one_group_by_hand() -> None:
    """Two inputs that are the same: the weight of the one that goes is added to the other."""
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64)
    W = torch.tensor([[5.0, 1e-3, 1.0, 3.0]], dtype=torch.float64)
    new, mask = sparsegpt(W, x.T @ x)
    assert mask.tolist() == [[True, False, False, True]]
    assert new[0, 3].item() == pytest.approx(4.0, rel=0.02)  # damped


def test_sparsegpt_takes_an_input_that_is_always_zero() -> None:
    H = correlated(16)
    H[5] = H[:, 5] = 0
    new, mask = sparsegpt(weights(4, 16), H)
    assert torch.isfinite(new).all() and (new[:, 5] == 0).all()
    assert (mask.reshape(4, 4, 4).sum(-1) == 2).all()


def best_error(W: torch.Tensor, H: torch.Tensor) -> float:
    """The least output error over all masks, with the best weights for each: rows are independent."""
    pairs = list(combinations(range(4), 2))
    total = 0.0
    for row in W:
        least = float("inf")
        for choice in product(pairs, repeat=W.shape[1] // 4):
            keep = [4 * group + i for group, pair in enumerate(choice) for i in pair]
            new = torch.zeros_like(row)
            new[keep] = torch.linalg.solve(H[keep][:, keep], (H @ row)[keep])
            least = min(least, float((row - new) @ H @ (row - new)))
        total += least
    return total / float(((W @ H) * W).sum())


def test_no_mask_with_any_weights_is_better_than_the_best_and_sparsegpt_comes_nearest() -> None:
    """It is greedy: on a single tiny layer it may lose, over thirty it does not."""
    errors = []
    for seed in range(30):
        W, H = weights(3, 8, seed), correlated(8, seed=seed)
        own = [output_error(W, criterion(W, H)[0], H) for criterion in (sparsegpt, wanda, magnitude)]
        errors.append([best_error(W, H), *own])
        assert errors[-1][0] <= min(own) * (1 + 1e-9)
    best, updated, *others = torch.tensor(errors).mean(0).tolist()
    assert best < updated < 0.5 * min(others)


def test_magnitude_is_exact_for_uncorrelated_inputs_of_one_scale() -> None:
    """The exhaustive best mask of each group is the one of the two largest."""
    W, H = weights(5, 8), torch.eye(8, dtype=torch.float64)
    assert output_error(W, magnitude(W)[0], H) == pytest.approx(best_error(W, H), rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_on_correlated_inputs_sparsegpt_is_below_wanda_and_magnitude(seed: int) -> None:
    W, H = weights(16, 256, seed), correlated(256, rows=1024, seed=seed)
    new = sparsegpt(W, H)[0]
    assert holds(new)
    errors = [output_error(W, criterion(W, H)[0], H) for criterion in (wanda, magnitude)]
    assert output_error(W, new, H) < 0.7 * min(errors)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 5),
        nn.Conv2d(8, 5, 3, padding=1, stride=2),
        nn.Conv2d(8, 5, (3, 2), padding="same", dilation=2),
        nn.Conv2d(8, 5, 3, padding=(1, 2), padding_mode="reflect"),
    ],
    ids=["linear", "conv", "same", "reflect"],
)
def test_the_gram_matrix_is_that_of_what_the_layer_multiplies(layer: nn.Module) -> None:
    x = torch.randn(5, 7, 8) if isinstance(layer, nn.Linear) else torch.randn(5, 8, 9, 9)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    with torch.no_grad():
        y = layer(x) - bias.reshape(-1, *[1] * (0 if isinstance(layer, nn.Linear) else 2))
        rows = rows_of(layer, x)
        outputs = y.flatten(0, 1) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, 2)
        assert torch.allclose(rows @ matrix_of(weight).T, outputs, atol=1e-5)
        H, W = gram_of(layer, x), matrix_of(weight).double()
    assert float(((W @ H) * W).sum()) == pytest.approx(float(outputs.double().square().sum()) / len(rows), rel=1e-4)
