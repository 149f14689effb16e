"""Every rule alone: which channel each index of the output comes from, what is refused, and that both are true."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers its operators
from torch import Tensor, nn

from edgeprune.errors import RefusedError
from edgeprune.graph import analyse, trace, tracing
from edgeprune.graph.atoms import Atoms
from edgeprune.graph.coupling import propagate
from edgeprune.graph.program import operator_name
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
UNSEEN = {
    "cudnn_batch_norm": "needs a GPU",
    "_assert_tensor_metadata": "comes up only in what torch.export traces",
    **dict.fromkeys(
        ("bincount", "masked_select", "nonzero", "_unique2"), "its output's shape depends on values: not traced at all"
    ),
}
"""Rules without a case, and why."""


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
    tried = [
        check_removal(each, each.inputs, seeds=range(5)) > 0
        for each in CASES
        if "*" in each.inputs and not each.refused
    ]
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


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).to(torch.float32))
        return result


def test_the_asserts_that_torch_export_adds_refuse_nothing() -> None:
    program = tracing.exported(Cast().eval(), (torch.zeros(1, 3),))
    assert "_assert_tensor_metadata" in {operator_name(node) for node in program.graph.nodes}
    (group,) = analyse(program).groups
    assert (group.id, group.num_channels) == ("first.bias:0", 4)


class TwoBranches(nn.Module):
    """One branch goes through an operator without a rule, the other does not."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.strange = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        strange = torch.special.bessel_j0(self.strange(x))
        result: Tensor = self.head(torch.cat([self.known(x), strange], 1).mean((2, 3)))
        return result


def test_an_unknown_operator_refuses_only_what_it_touches() -> None:
    graph = trace(TwoBranches(), (torch.zeros(1, 3, 4, 4),))
    (group,) = graph.groups
    assert {m.parameter for m in group.members} == {"known.weight", "known.bias", "head.weight"}
    assert next(m for m in group.members if m.parameter == "head.weight").channels.tolist() == [
        0,
        1,
        2,
        3,
        -1,
        -1,
        -1,
        -1,
    ]
    name = "special_bessel_j0"
    assert (name, f"operator '{name}' has no coupling rule") in {(r.operator, r.reason) for r in graph.refused}


def test_a_convolution_whose_kernel_is_computed_keeps_its_positions() -> None:
    """Features of the linear become [out, in, height, width] of a kernel: three channels out may go, no position."""
    found = carried(lambda x, features: F.conv2d(x, features.view(3, 2, 2, 2)), "1 2* 4 4; 24*")
    kernel = [root for root in range(found.atoms.count) if found.atoms.must_stay(root)]
    assert {found.atoms.must_stay(root).reason for root in kernel} == {"the positions of its kernel hold channels"}  # type: ignore[union-attr]


@pytest.mark.parametrize(("role", "dim"), [("consumer", 1), ("producer", 0)])
def test_roles_of_a_linear(role: str, dim: int) -> None:
    program = tracing.trace_program(nn.Linear(3, 4), (torch.zeros(1, 3),))
    atoms = Atoms()
    propagate(program, atoms)
    assert atoms.roles["weight", dim] == role


def test_a_parameter_from_a_product_of_parameters_stays() -> None:
    """Along the sum; its rows and columns may go."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a @ self.b)

    atoms = Atoms()
    propagate(tracing.trace_program(Product(), (torch.zeros(1, 3),)), atoms)
    reasons = {atoms.must_stay(root) for root in atoms.roots(atoms.dims["a", 1]).ravel().tolist()}
    assert {refusal.reason for refusal in reasons if refusal} == {
        "it computes a parameter from a sum over this dimension"
    }


CONSTANT = torch.ones(4, 1, 1)


class Held(nn.Module):
    """Python code holds a tensor that is no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.conv(x) * CONSTANT).sum((2, 3))
        return result


def test_a_tensor_that_python_code_holds_stays_whole() -> None:
    atoms = Atoms()
    propagate(tracing.trace_program(Held(), (torch.zeros(2, 3, 3, 5),)), atoms)
    refusal = atoms.must_stay(int(atoms.roots(atoms.dims["conv.weight", 0])[0, 0]))
    assert refusal is not None
    assert (refusal.operator, refusal.reason) == ("constant", "it is no parameter and no buffer")


def test_tracing_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    tracing.trace_program(model, (torch.zeros(1, 3, 2, 2),))
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(RefusedError, match="nothing in this model can be pruned"):
        trace(nn.ReLU(), (torch.zeros(1, 3),))
