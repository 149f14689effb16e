"""A short selection of the zoo of `benchmarks/coverage` through the first two gates: it runs, and it is exact."""

from __future__ import annotations

import importlib.util

import pytest

from edgeprune.surgery import apply
from tests.reference import difference, masked_outputs, outputs_of, random_plan, shift_one

pytestmark = pytest.mark.integration

MODELS = (
    *("torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "torchvision:regnet_x_400mf"),
    *("torchvision:swin_t", "torchvision:convnext_tiny", "torchvision:lraspp_mobilenet_v3_large"),
    *("timm:levit", "timm:res2net", "timm:mobilevit", "timm:convnext"),
    *("hf:bert", "hf:llama", "hf:t5", "hf:swin", "hf:mixtral"),
)
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_of_the_zoo_is_exact(name: str) -> None:
    package = PACKAGES[name.partition(":")[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install edgeprune[dev]")
    from benchmarks.coverage import zoo
    from benchmarks.coverage.weights import float64, redraw_all
    from edgeprune.graph import trace

    model, inputs = zoo.build(name)
    redraw_all(model, inputs, 0)
    model = model.double()
    x = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    with float64():
        graph = trace(model, x)
        plan = random_plan(graph, 1)
        expected = masked_outputs(graph, plan, model, x)
        got = outputs_of(apply(plan, model, x, graph=graph).module, x)
        assert max(difference(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-9
        for which in range(6):  # a channel that a ReLU silences changes nothing
            moved = outputs_of(apply(shift_one(plan, graph, which), model, x, graph=graph).module, x)
            if max(difference(a, b) for a, b in zip(moved, expected, strict=True)) > 1e-6:
                return
    raise AssertionError("the negative control passed: with another channel kept the output is the same")
