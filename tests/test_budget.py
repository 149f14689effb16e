from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import Budget, parse_budget
from edgeprune.errors import InputError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("8ms", "latency", 8.0),
        ("0.5s", "latency", 500.0),
        ("900us", "latency", 0.9),
        ("900µs", "latency", 0.9),
        (" 1.5e1 ms ", "latency", 15.0),
        ("120fps", "rate", 120.0),
        ("120 FPS", "rate", 120.0),
        ("0.6x", "ratio", 0.6),
        ("1x", "ratio", 1.0),
        ("60%", "ratio", 0.6),
    ],
)
def test_budgets_are_read(text: str, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert budget.kind == kind
    assert budget.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8", "has no unit"),
        ("", "is empty"),
        ("-3ms", "is negative"),
        ("0x", "above 0"),
        ("0ms", "above 0"),
        ("1e400ms", "above 0 and finite"),
        ("1.2x", "at most 1x"),
        ("120%", "at most 1x"),
        ("nan ms", "start with a number"),
        ("inf ms", "start with a number"),
        ("8min", "unknown unit 'min'"),
        ("8ms!", "unknown unit 'ms!'"),
        ("1_0ms", "unknown unit"),
        ("fast", "start with a number"),
        ("8.5.1ms", "unknown unit"),
        ("٣ms", "start with a number"),
    ],
)
def test_nonsense_is_refused_and_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_budget(text)
    assert f"'{text}'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_limits_in_ms() -> None:
    assert parse_budget("8ms").limit_ms() == 8
    assert parse_budget("100fps").limit_ms(batch=4) == pytest.approx(40)
    assert parse_budget("0.6x").limit_ms(20.0) == pytest.approx(12)
    with pytest.raises(ValueError, match="dense"):
        parse_budget("0.6x").limit_ms()


@given(st.sampled_from(["latency", "rate", "ratio"]), st.floats(1e-3, 1.0))
def test_a_printed_budget_reads_back(kind: str, value: float) -> None:
    budget = Budget(kind=kind, value=value)  # type: ignore[arg-type]
    back = parse_budget(str(budget))
    assert back.kind == kind
    assert back.value == pytest.approx(value, rel=1e-5)
