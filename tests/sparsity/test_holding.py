"""Layers made 2:4 one after another, the pattern held through training, and taken along into plain modules."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from edgeprune.errors import InputError, SurgeryError
from edgeprune.pattern import holds, mask_by_magnitude
from edgeprune.plan_json import Plan
from edgeprune.pruned import Pruned
from edgeprune.sparsity import baked, held, sparsify
from edgeprune.sparsity.sparsifying import Criterion
from tests.small_models import redrawn

pytestmark = pytest.mark.unit

LAYERS = ("2.weight", "5.weight", "8.weight")


def network() -> Pruned:
    module = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    inputs = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
    return Pruned(module=redrawn(module), plan=Plan(structure_hash="0" * 64), example_inputs=inputs, origin="0" * 64)


def samples(count: int = 32) -> torch.Tensor:
    small = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(small, size=8, mode="bilinear")  # smooth, as pictures are


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_layers_become_sparse_and_the_plan_says_so(criterion: Criterion) -> None:
    given = network()
    before = {name: tensor.clone() for name, tensor in given.module.state_dict().items()}
    sparse, report = sparsify(given, LAYERS, criterion=criterion, samples=(samples(),))
    assert sparse.plan.formats == dict.fromkeys(LAYERS, "2:4")
    tensors = sparse.module.state_dict()
    assert all(holds(tensors[name]) for name in LAYERS)
    assert [layer.parameter for layer in report] == list(LAYERS)
    assert all(0.5 < layer.kept_magnitude < 1 and layer.error is not None and 0 < layer.error < 1 for layer in report)
    assert all(before[name].equal(tensor) for name, tensor in given.module.state_dict().items())


def test_sparsegpt_leaves_least_of_an_error_at_the_output() -> None:
    given, x = network(), samples()
    errors = {}
    with torch.no_grad():
        for criterion in ("magnitude", "wanda", "sparsegpt"):
            sparse, _ = sparsify(given, LAYERS, criterion=criterion, samples=(x,))
            errors[criterion] = float((sparse.module(x) - given.module(x)).square().mean())
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


def test_without_samples_only_magnitude() -> None:
    _, report = sparsify(network(), ["5.weight"])
    assert (report[0].criterion, report[0].error) == ("magnitude", None)
    with pytest.raises(InputError, match="sparsegpt looks at the layers' inputs: give samples"):
        sparsify(network(), ["5.weight"], criterion="sparsegpt")


def test_what_can_not_be_sparse_is_listed() -> None:
    with pytest.raises(InputError) as caught:
        sparsify(network(), ["0.weight", "5.bias", "8.wieght"])
    assert str(caught.value).startswith("can't be made 2:4: ")
    for part in ("'0.weight': its 3 input channels are no multiple of 4", "'5.bias': its shape [16] has no input"):
        assert part in str(caught.value)
    assert "'8.wieght' is no parameter of the model; did you mean '8.weight'?" in str(caught.value)


def test_zeros_anywhere_are_the_smallest_of_a_whole_weight() -> None:
    """Of the 16x10 weight of the head, which is no multiple of four, nine of ten go; a plan alone does the same."""
    given = network()
    weight = given.module.get_parameter("8.weight").detach()
    sparse, (report,) = sparsify(given, ["8.weight"], zeros=0.9)
    found = sparse.module.get_parameter("8.weight").detach()
    smallest = weight.abs().flatten().sort().values[143]
    assert found.equal(torch.where(weight.abs() > smallest, weight, 0.0)) and (found == 0).sum() == 144
    assert sparse.plan.formats == {"8.weight": "zeros:0.9"}
    assert report.kept_magnitude == pytest.approx(float(found.abs().sum() / weight.abs().sum()))
    module = copy.deepcopy(given.module)
    mask_by_magnitude(module, sparse.plan.formats)
    assert module.get_parameter("8.weight").equal(found)


def test_zeros_anywhere_are_held_too() -> None:
    sparse, _ = sparsify(network(), ["5.weight", "8.weight"], zeros=0.75)
    training = held(sparse)
    with torch.no_grad():
        for parameter in training.module.parameters():
            parameter.add_(1.0)
    assert all((baked(training).module.get_parameter(f"{i}.weight") == 0).double().mean() == 0.75 for i in (5, 8))
    with torch.no_grad():
        sparse.module.get_parameter("8.weight").add_(1.0)
    with pytest.raises(SurgeryError, match=r"wants '8.weight' as zeros:0.75, but it is not any more: train"):
        baked(sparse)


@pytest.mark.parametrize(
    ("names", "zeros", "criterion", "why"),
    [
        (["8.weight"], 1.0, "magnitude", "zeros is a share above 0 and below 1, found 1.0"),
        (["8.weight"], 0.9, "wanda", "wanda makes 2:4; zeros anywhere are chosen by magnitude"),
        (["5.bias"], 0.9, "magnitude", r"can't be made zeros:0.9: '5.bias': its shape \[16\] has no input channels"),
    ],
)
def test_zeros_that_can_not_be_made(names: list[str], zeros: float, criterion: Criterion, why: str) -> None:
    with pytest.raises(InputError, match=why):
        sparsify(network(), names, zeros=zeros, criterion=criterion, samples=(samples(),))


def test_zeros_stay_zeros_while_everything_else_is_trained() -> None:
    sparse, _ = sparsify(network(), LAYERS, criterion="sparsegpt", samples=(samples(),))
    training = held(sparse)
    training.module.train()
    for step in range(50):
        x = samples(8) + 0.1 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = training.module(x).square().mean()
        parameters = list(training.module.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(1e-2 * (gradient + 0.1))  # pushes the zeros away too
    trained = baked(training)
    before, after = sparse.module.state_dict(), trained.module.state_dict()
    assert sorted(after) == sorted(before)
    for name in LAYERS:
        assert holds(after[name]) and not after[name].equal(before[name])
        assert ((after[name] != 0) == (before[name] != 0)).double().mean() > 0.999
    with torch.no_grad():
        training.module.eval()
        assert trained.module.eval()(samples()).equal(training.module(samples()))


def test_baking_leaves_plain_modules_and_other_parametrisations_alone() -> None:
    sparse, _ = sparsify(network(), LAYERS)
    assert baked(sparse) is sparse
    training = held(sparse)
    parametrize.register_parametrization(training.module.get_submodule("0"), "weight", nn.Identity())
    plain = baked(training)
    assert parametrize.is_parametrized(plain.module.get_submodule("0"))
    assert not parametrize.is_parametrized(plain.module.get_submodule("2"))
    assert parametrize.is_parametrized(training.module.get_submodule("2"))


def test_a_module_that_is_parametrised_already_is_refused() -> None:
    sparse, _ = sparsify(network(), LAYERS)
    parametrize.register_parametrization(sparse.module.get_submodule("2"), "bias", nn.Identity())
    with pytest.raises(SurgeryError, match="'2' is parametrised already"):
        held(sparse)


def test_a_pattern_that_was_trained_away_is_an_error() -> None:
    sparse, _ = sparsify(network(), LAYERS)
    with torch.no_grad():
        for name in LAYERS[:2]:
            sparse.module.get_parameter(name).add_(1.0)
    with pytest.raises(SurgeryError, match=r"wants '2.weight' and 1 more as 2:4, .* train edgeprune.sparsity.held"):
        baked(sparse)
    assert baked(replace(sparse, plan=replace(sparse.plan, formats={}))).module is sparse.module
