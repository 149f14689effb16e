from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import Budget, check_wanted, parse_budget, parse_wanted
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


@pytest.mark.parametrize(
    ("text", "kind", "value", "of"),
    [
        ("8ms", "latency", 8.0, ""),
        ("8ms@nuc", "latency", 8.0, "nuc"),
        ("0.6x@nuc", "ratio", 0.6, "nuc"),
        ("2MB@params", "bytes", 2e6, "params"),
        ("1.5MiB@params", "bytes", 1.5 * 2**20, "params"),
        ("500k@params", "count", 5e5, "params"),
        ("1200@params", "count", 1200.0, "params"),
        ("50%@params", "ratio", 0.5, "params"),
        ("1.2G @ macs", "count", 1.2e9, "macs"),
        ("0.5x@macs", "ratio", 0.5, "macs"),
    ],
)
def test_a_budget_says_what_it_is_of(text: str, kind: str, value: float, of: str) -> None:
    wanted = parse_wanted(text)
    assert (wanted.budget.kind, wanted.of) == (kind, of)
    assert wanted.budget.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8ms@", "names nothing behind the @"),
        ("8@nuc", "has no unit"),
        ("8ms@params", "is no amount of params"),
        ("2MB@macs", "is no amount of macs"),
        ("2Mi@params", "is no amount of params"),
        ("0@params", "above 0"),
        ("2x@params", "at most 1x"),
        ("2MB@memory", "maximum over time"),
        ("2J@energy", "no device here measures it"),
    ],
)
def test_what_no_budget_can_be_of_is_said(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_wanted(text)


def test_two_budgets_of_one_thing_are_refused() -> None:
    check_wanted(map(parse_wanted, ["8ms", "8ms@nuc", "1M@params"]), "orin")
    with pytest.raises(InputError, match=r"two budgets of nuc: 8 ms and 0.5x"):
        check_wanted(map(parse_wanted, ["8ms@nuc", "0.5x@nuc"]))
    with pytest.raises(InputError, match="two budgets of orin"):
        check_wanted(map(parse_wanted, ["8ms", "9ms@orin"]), "orin")


def test_amounts_are_limits_of_what_they_are_of() -> None:
    assert parse_wanted("0.5x@params").budget.limit_of(1000) == 500
    assert parse_wanted("2k@params").budget.limit_of(1000) == 2000
    assert str(parse_wanted("1.5M@params").budget) == "1.5M"
    assert str(parse_wanted("2MB@params")) == "2MB of params"
    with pytest.raises(ValueError, match="is no latency"):
        parse_wanted("2k@params").budget.limit_ms(1.0)
    with pytest.raises(ValueError, match="is a latency"):
        parse_budget("8ms").limit_of(1.0)
