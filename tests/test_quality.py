"""Quality against labels and against the dense model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.data import as_data
from edgeprune.errors import InputError
from edgeprune.quality import check_takes, divergence, evaluate, outputs, squared_difference

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
DATA = as_data([(LOGITS, torch.tensor([0, 1, 1, 1]))])


def test_top1_agreement_and_divergence_by_hand() -> None:
    quality = evaluate(lambda x: x * torch.tensor([1.0, -1.0]), DATA, dense=lambda x: x, batch_size=3)
    assert (quality.n, quality.top1, quality.agreement) == (4, 0.25, 0.5)
    p = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)
    other = LOGITS.numpy() * [1, -1]
    q = np.exp(other) / np.exp(other).sum(1, keepdims=True)
    assert quality.kl == pytest.approx(float((p * np.log(p / q)).sum(1).mean()))
    assert quality.relative_error == pytest.approx((4 * (1 + 16) / 30) ** 0.5)
    assert quality.to_json()["top1"] == 0.25


def test_data_that_a_model_cannot_take_is_told_before_anything_runs() -> None:
    words = torch.nn.Embedding(10, 2)
    ids = torch.zeros(200, 3, dtype=torch.int64)
    check_takes(words, as_data([ids]))
    ids[150, 1] = 10  # far from the first sample
    with pytest.raises(
        InputError, match=r"can't take the data \(int64 \(2, 3\), 0 to 10\): IndexError: index out of range"
    ):
        check_takes(words, as_data([ids]))
    flags = torch.zeros(4, 3, dtype=torch.bool)
    flags[2] = True
    check_takes(torch.nn.Identity(), as_data([flags], dtype=torch.bool))
    with pytest.raises(InputError, match="the model takes 2 inputs, data is for one: wrap the model"):
        check_takes(words, as_data([ids]), num_inputs=2)
    with pytest.raises(InputError, match=r"can't take the data \(float32 \(1, 2\)\): RuntimeError"):
        check_takes(torch.nn.Linear(3, 1), DATA)


def test_the_dense_model_agrees_with_itself() -> None:
    dense = outputs(lambda x: x, DATA)
    quality = evaluate(lambda x: x, DATA, dense=dense)
    assert (quality.top1, quality.agreement, quality.kl, quality.relative_error) == (0.75, 1.0, 0.0, 0.0)


def test_an_engine_answers_with_arrays_one_by_one() -> None:
    sizes = []

    def engine(x: torch.Tensor) -> list[object]:
        sizes.append(len(x))
        return [x.numpy()]

    assert evaluate(engine, DATA, dense=lambda x: {"out": x}, batch_size=1).agreement == 1.0
    assert sizes == [1, 1, 1, 1]


def test_what_has_no_classes_or_no_labels_says_less() -> None:
    unlabelled = as_data([torch.ones(3, 2, 4)])
    quality = evaluate(lambda x: x * 1.5, unlabelled, dense=lambda x: x)
    assert (quality.top1, quality.agreement, quality.kl, quality.relative_error) == (None, None, None, 0.5)
    alone = evaluate(lambda x: x, as_data([LOGITS]))
    assert (alone.n, alone.top1, alone.agreement) == (4, None, None)


def test_faults_are_told() -> None:
    with pytest.raises(InputError, match="label 2, the model only 2 classes"):
        evaluate(lambda x: x, as_data([(LOGITS, torch.tensor([0, 1, 2, 0]))]))
    with pytest.raises(ValueError, match="can't be compared"):
        evaluate(lambda x: x[:, :1], DATA, dense=lambda x: x)


def test_divergence_of_far_logits_is_finite() -> None:
    far = divergence(torch.tensor([[1000.0, -1000.0]]), torch.tensor([[-1000.0, 1000.0]]))
    assert far.dtype == torch.float64 and far.item() == pytest.approx(2000.0)


def test_squared_difference_by_hand() -> None:
    """(1, 3) and (2, 8) from (0, 0), (2, 2): changes (1, 3), (0, 6); of logits only what sets them apart counts."""
    model, dense = torch.tensor([[1.0, 3.0], [2.0, 8.0]]), torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    assert squared_difference(dense, model).tolist() == [0.5, 4.5]
    assert squared_difference(dense[..., None], model[..., None]).tolist() == [2.5, 9.0]
