"""Every rule alone: which channel each index of the output comes from, what is refused, and that both are true."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision  # noqa: F401  registers its operators
from torch import Tensor, nn

from edgeprune.graph import trace, tracing
from edgeprune.graph.atoms import Atoms
from edgeprune.graph.coupling import propagate
from edgeprune.graph.rules import RULES
from tests.graph import rule_cases as one
from tests.graph import rule_cases_sums as summed
from tests.graph.rule_case import Case, all_starred, carried, check_removal, labels

pytestmark = pytest.mark.unit

CASES = [
    *itertools.chain.from_iterable(
        getattr(module, family)
        for module in (one, summed)
        for family in vars(module)
        if family.isupper() and isinstance(getattr(module, family), list)
    )
]
UNSEEN: dict[str, str] = {}


def named(cases: list[Case]) -> list[object]:
    return [pytest.param(each, id=f"{each.name}-{each.inputs.replace(' ', '_')}") for each in cases]


@pytest.mark.parametrize("each", named(CASES))
def test_labels_and_refusals(each: Case) -> None:
    found = carried(each.function, each.inputs)
    assert each.name in found.operators
    assert (labels(found.atoms, found.outputs), found.reasons) == (each.labels, each.refused)
    if each.then:
        assert labels(found.atoms, found.inputs) == each.then


@pytest.mark.parametrize("each", named(CASES))
def test_removing_channels_does_what_the_labels_say(each: Case) -> None:
    check_removal(each, each.inputs, seeds=range(5))


@pytest.mark.parametrize("each", named(CASES))
def test_it_also_holds_with_channels_in_every_dimension(each: Case) -> None:
    check_removal(each, all_starred(each.inputs), seeds=range(12))


def test_most_cases_have_something_to_remove() -> None:
    """Against a test that passes because nothing was ever removed."""
    tried = [check_removal(each, each.inputs, seeds=range(5)) > 0 for each in CASES if "*" in each.inputs and not each.refused]
    assert sum(tried) > 0.9 * len(tried)


def test_a_wrong_label_is_noticed() -> None:
    """The negative control: a result whose indices were shifted by one."""
    wrong = Case(
        name="roll",
        function=lambda x: x.roll(1, 0),
        inputs="4*",
        labels="",
        refused=frozenset(),
        then="",
        meaning="carries",
    )
    RULES["roll"], rule = RULES["relu"], RULES["roll"]
    try:
        with pytest.raises(AssertionError):
            check_removal(wrong, wrong.inputs, seeds=range(5))
    finally:
        RULES["roll"] = rule


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_for_an_operator_that_exists(name: str) -> None:
    assert name == "getitem" or hasattr(torch.ops.aten, name) or hasattr(torch.ops.torchvision, name)


def test_every_rule_has_a_case() -> None:
    seen = {each.name for each in CASES}
    assert set(RULES) - seen == set(UNSEEN)
