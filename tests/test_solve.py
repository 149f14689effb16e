"""The solver against hand-worked cases, brute force and an independent program."""

from __future__ import annotations

import doctest
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

import edgeprune.solve
import edgeprune.solve.elimination
from edgeprune.errors import EdgepruneError, InputError, StorageError
from edgeprune.solve import Factor, Problem, Solution, solve

pytestmark = pytest.mark.unit
INF = math.inf


def knapsack(limit: float) -> Problem:
    """Three things to take (option 1) or leave (option 0): worth 6, 5, 4 at weights 3, 2, 2."""
    things = {"a": (6.0, 3.0), "b": (5.0, 2.0), "c": (4.0, 2.0)}
    factors = [
        Factor(variables=(name,), value=np.array([0, worth]), cost={"weight": np.array([0, weight])})
        for name, (worth, weight) in things.items()
    ]
    return Problem(variables=dict.fromkeys(things, 2), budgets={"weight": limit}, factors=factors)


def chain(length: int, options: int, *, budgets: int = 1, share: float = 0.4, seed: int = 0) -> Problem:
    """Widths of a chain of layers with residual links: staircase costs of pairs, concave values."""
    rng = np.random.default_rng(seed)
    width = np.arange(1, options + 1) / options
    factors = [
        Factor(variables=(f"g{i}",), value=rng.lognormal(0, 0.7) * np.cumsum(np.sort(rng.random(options))[::-1]))
        for i in range(length)
    ]
    totals = dict.fromkeys([f"b{i}" for i in range(budgets)], 0.0)
    for a, b in [(i, i + 1) for i in range(length - 1)] + [(i, i + 3) for i in range(0, length - 3, 4)]:
        cost = {}
        for name in totals:
            steps = np.ceil(20 * np.outer(width, width)) * rng.lognormal(0, 0.8)
            cost[name] = steps * (1 + 0.1 * rng.random((options, options))) + 1
            totals[name] += float(cost[name].max())
        factors.append(Factor(variables=(f"g{a}", f"g{b}"), value=np.zeros((options, options)), cost=cost))
    limits = {name: share * total for name, total in totals.items()}
    return Problem(variables={f"g{i}": options for i in range(length)}, budgets=limits, factors=factors)


@pytest.fixture(params=["enumerated", "eliminated", "whole"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to an answer, in this process: enumeration, elimination before HiGHS, HiGHS on the whole model."""
    way = str(request.param)
    if way != "enumerated":
        monkeypatch.setattr(edgeprune.solve, "LARGEST", 0)
    if way == "whole":
        monkeypatch.setattr(edgeprune.solve.elimination, "LARGEST_JOIN", 1)
    return way


# By hand


@pytest.mark.parametrize(
    ("limit", "taken", "value"), [(7, "abc", 15), (5, "ab", 11), (4, "bc", 9), (3, "a", 6), (2, "b", 5), (1, "", 0)]
)
def test_a_knapsack(engine: str, limit: float, taken: str, value: float) -> None:
    solution = solve(knapsack(limit), in_process=True)
    assert solution.feasible and solution.status == "solved"
    assert {name for name, option in solution.choice.items() if option} == set(taken)
    assert solution.value == value
    assert solution.cost["weight"] <= limit
    assert value <= solution.upper_bound <= value + 1e-4 * 15


def test_a_pair_costs_what_both_ends_say(engine: str) -> None:
    """Both wide is best but costs 4; one wide costs 2 and the second is worth more."""
    pair = Factor(variables=("x", "y"), value=np.zeros((2, 2)), cost={"us": np.array([[1, 2], [2, 4]])})
    ends = [Factor(variables=(n,), value=np.array([0, v])) for n, v in (("x", 1.0), ("y", 1.5))]
    problem = Problem(variables={"x": 2, "y": 2}, budgets={"us": 3}, factors=[pair, *ends])
    solution = solve(problem, in_process=True)
    assert solution.choice == {"x": 0, "y": 1}
    assert (solution.value, solution.cost) == (1.5, {"us": 2.0})


def test_the_axes_follow_the_factor_not_the_problem(engine: str) -> None:
    value = np.array([[0, 0, 7], [0, 0, 0]])
    factors = [Factor(variables=("b", "a"), value=value), Factor(variables=("a", "b"), value=0.5 * value.T)]
    solution = solve(Problem(variables={"a": 3, "b": 2}, budgets={}, factors=factors), in_process=True)
    assert solution.choice == {"a": 2, "b": 0}
    assert solution.value == 10.5


def test_an_infinite_cost_forbids(engine: str) -> None:
    cost = np.array([[INF, INF], [INF, 1.0]])
    factor = Factor(variables=("x", "y"), value=np.array([[9, 9], [9, 0]]), cost={"us": cost})
    for limit in (2.0, INF):
        solution = solve(Problem(variables={"x": 2, "y": 2}, budgets={"us": limit}, factors=[factor]), in_process=True)
        assert solution.choice == {"x": 1, "y": 1}
        assert solution.feasible


def test_everything_forbidden(engine: str) -> None:
    """x != y and y != z and x != z with two colours."""
    differ = np.array([[INF, 0], [0, INF]])
    factors = [
        Factor(variables=pair, value=np.zeros((2, 2)), cost={"us": differ}) for pair in itertools.combinations("xyz", 2)
    ]
    solution = solve(Problem(variables=dict.fromkeys("xyz", 2), budgets={"us": 1}, factors=factors), in_process=True)
    assert not solution.feasible
    assert solution.status == "forbidden"
    assert solution.choice == {}
    assert solution.least_ratio == INF
    assert json.loads(json.dumps(solution.to_document(), allow_nan=False))["least_ratio"] is None


def test_out_of_reach_names_the_least_ratio(engine: str) -> None:
    """Costs (3, 1) or (2, 2) against limits (1, 1): the least largest ratio is 2."""
    cost = {"us": np.array([3.0, 2.0]), "bytes": np.array([1.0, 2.0])}
    problem = Problem(
        variables={"x": 2, "y": 1},
        budgets={"us": 1, "bytes": 1},
        factors=[Factor(variables=("x",), value=np.array([5, 4]), cost=cost)],
    )
    solution = solve(problem, in_process=True)
    assert not solution.feasible
    assert solution.status == "over budget"
    assert solution.choice == {"x": 1, "y": 0}
    assert solution.cost == {"us": 2.0, "bytes": 2.0}
    assert solution.least_ratio == 2.0
    assert solution.gap == INF


def test_a_budget_is_met_exactly_or_not_at_all(engine: str) -> None:
    """A sum that equals the limit fits; one that is a millionth of a millionth above does not."""
    for excess, taken in ((0.0, 1), (1e-12, 0)):
        things = [
            Factor(variables=(n,), value=np.array([0, 1]), cost={"us": np.array([0, 0.5 + excess])}) for n in "xy"
        ]
        solution = solve(Problem(variables={"x": 2, "y": 2}, budgets={"us": 1.0}, factors=things), in_process=True)
        assert solution.choice["x"] + solution.choice["y"] == 1 + taken
        assert solution.cost["us"] <= 1.0


def test_degenerate_problems(engine: str) -> None:
    empty = solve(Problem(variables={}, budgets={}, factors=[]), in_process=True)
    assert (empty.feasible, empty.choice, empty.value, empty.gap) == (True, {}, 0.0, 0.0)
    alone = solve(Problem(variables={"x": 5, "y": 1}, budgets={"us": 3.0}, factors=[]), in_process=True)
    assert alone.choice == {"x": 0, "y": 0}
    assert alone.cost == {"us": 0.0}
    free = Factor(variables=("x",), value=np.array([-3.0, -1.0, -2.0]))
    losing = solve(Problem(variables={"x": 3}, budgets={"us": 1.0}, factors=[free]), in_process=True)
    assert (losing.choice, losing.value) == ({"x": 1}, -1.0)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_the_unit_of_the_value_does_not_matter(engine: str, scale: float) -> None:
    problem = knapsack(4)
    scaled = [Factor(variables=f.variables, value=scale * f.value - 7 * scale, cost=f.cost) for f in problem.factors]
    solution = solve(Problem(variables=problem.variables, budgets=problem.budgets, factors=scaled), in_process=True)
    assert solution.choice == {"a": 0, "b": 1, "c": 1}
    assert solution.gap <= 1e-4


# Against brute force


def brute_force(problem: Problem) -> tuple[float | None, float, float]:
    """(best value inside the budgets, unconstrained best value, least ratio) by trying everything."""
    best, free, least = None, -INF, INF
    for options in itertools.product(*(range(k) for k in problem.variables.values())):
        choice = dict(zip(problem.variables, options, strict=True))
        cost, value = problem.cost_of(choice), problem.value_of(choice)
        if INF in cost.values():
            continue
        free = max(free, value)
        least = min(least, max((cost[b] / limit for b, limit in problem.budgets.items()), default=0.0))
        if all(cost[b] <= limit for b, limit in problem.budgets.items()) and (best is None or value > best):
            best = value
    return best, free, least


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "tree": [(0, 1), (1, 2), (1, 3), (3, 4)],
    "cycle": [(0, 1), (2, 1), (2, 3), (3, 4), (0, 4)],
    "triples": [(0, 1, 2), (3, 2, 4), (1, 2), (4,)],
    "loose": [(0,), (2,), (3, 1)],
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Five variables with 1 to 3 options, option 0 free ("gone"), whole or decimal numbers, some forbidden."""
    sizes = [draw(st.integers(1, 3)) for _ in range(5)]
    budgets = {f"b{i}": float(draw(st.integers(1, 25))) for i in range(draw(st.integers(0, 3)))}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    unit, forbidden, gone = draw(st.sampled_from([1.0, 0.1, 1e6])), draw(st.booleans()), draw(st.booleans())
    factors = []
    for scope in [*SHAPES[draw(st.sampled_from(sorted(SHAPES)))], (0,), (1,)]:
        shape = tuple(sizes[v] for v in scope)
        cost: dict[str, Any] = {b: unit * rng.integers(0, 9, shape) for b in budgets}
        for table in cost.values():
            if gone:
                table[(0,) * len(scope)] = 0.0
            if forbidden:
                table[rng.random(shape) < 0.15] = INF
        factors.append(
            Factor(
                variables=tuple(f"v{v}" for v in scope), value=rng.integers(-3, 9, shape).astype(np.float64), cost=cost
            )
        )
    limits = {b: unit * limit for b, limit in budgets.items()}
    return Problem(variables={f"v{i}": k for i, k in enumerate(sizes)}, budgets=limits, factors=factors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_as_good_as_brute_force(engine: str, problem: Problem) -> None:
    best, free, least = brute_force(problem)
    solution = solve(problem, in_process=True)
    assert solution.feasible == (best is not None)
    if best is None:
        assert solution.value == -INF or solution.value == problem.value_of(solution.choice)
        assert solution.least_ratio == (INF if least == INF else pytest.approx(least, rel=2e-6))
        return
    assert solution.status == "solved"
    assert best - 1e-4 * (free + 40) <= solution.value <= best
    assert solution.upper_bound >= best - 1e-6
    assert solution.value == problem.value_of(solution.choice)
    assert solution.cost == problem.cost_of(solution.choice)
    assert all(solution.cost[b] <= limit for b, limit in problem.budgets.items())


# Against an independent program


def oracle(problem: Problem) -> float:
    """The best value by one binary per combination of each factor, factors tied by equal marginals."""
    sizes = list(problem.variables.values())
    names = {name: i for i, name in enumerate(problem.variables)}
    first = np.concatenate([[0], np.cumsum(sizes)])
    width = int(first[-1]) + sum(f.value.size for f in problem.factors)
    rows: list[Any] = []
    right: list[float] = []
    gain, costs = np.zeros(width), {b: np.zeros(width) for b in problem.budgets}
    for v, size in enumerate(sizes):
        rows.append(sparse.csr_array(([1.0] * size, ([0] * size, range(first[v], first[v] + size))), shape=(1, width)))
        right.append(1.0)
    column = int(first[-1])
    for factor in problem.factors:
        own = np.arange(column, column + factor.value.size).reshape(factor.value.shape)
        gain[own] = factor.value
        for b, table in factor.cost.items():
            costs[b][own] = table
        for axis, name in enumerate(factor.variables):
            for option in range(problem.variables[name]):
                at = np.append(own.take(option, axis).ravel(), first[names[name]] + option)
                signs = np.append(np.ones(len(at) - 1), -1.0)
                rows.append(sparse.csr_array((signs, ([0] * len(at), at)), shape=(1, width)))
                right.append(0.0)
        column += factor.value.size
    limits = [LinearConstraint(costs[b][None], -np.inf, limit) for b, limit in problem.budgets.items()]
    ties = LinearConstraint(sparse.csr_array(sparse.vstack(rows)), right, right)
    result = milp(-gain, constraints=[ties, *limits], integrality=np.ones(width, dtype=np.int64), bounds=Bounds(0, 1))
    assert result.success
    return float(-result.fun)


@pytest.mark.parametrize(("budgets", "share", "seed"), [(1, 0.3, 1), (1, 0.6, 2), (2, 0.4, 3), (3, 0.5, 4)])
def test_as_good_as_an_independent_program(budgets: int, share: float, seed: int) -> None:
    problem = chain(9, 5, budgets=budgets, share=share, seed=seed)
    best = oracle(problem)
    solution = solve(problem, in_process=True, gap=1e-7)
    assert solution.gap <= 1e-7
    assert solution.value == pytest.approx(best, rel=2e-6)
    assert solution.upper_bound >= best * (1 - 1e-6)


def test_a_dense_graph_goes_to_highs_whole_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = chain(8, 4, share=0.5, seed=5)
    eliminated = solve(problem, in_process=True, gap=1e-7)
    monkeypatch.setattr(edgeprune.solve.elimination, "LARGEST_JOIN", 1)
    whole = solve(problem, in_process=True, gap=1e-7)
    assert whole.value == pytest.approx(eliminated.value, rel=1e-6)


# Size, repeatability, time limit


def test_forty_variables_of_sixteen_options_are_proven_in_seconds_and_repeatably() -> None:
    problem = chain(40, 16)
    first, second = solve(problem), solve(problem)
    assert first.gap <= 1e-4
    assert first.seconds < 10
    assert (first.choice, first.upper_bound) == (second.choice, second.upper_bound)


def test_this_process_and_the_child_agree() -> None:
    problem = chain(12, 8, budgets=2)
    here, there = solve(problem, in_process=True), solve(problem)
    assert vars(here) | {"seconds": 0} == vars(there) | {"seconds": 0}


def hard() -> Problem:
    """A complete graph of random pairs: neither elimination nor HiGHS is through in a minute."""
    rng = np.random.default_rng(0)
    names = [f"v{i}" for i in range(16)]
    factors = [
        Factor(variables=pair, value=rng.random((12, 12)), cost={"us": rng.random((12, 12))})
        for pair in itertools.combinations(names, 2)
    ]
    return Problem(variables=dict.fromkeys(names, 12), budgets={"us": 45.0}, factors=factors)


def test_a_time_limit_ends_with_an_error_or_an_honest_gap() -> None:
    started = time.monotonic()
    try:
        solution = solve(hard(), time_limit_s=2.0)
    except EdgepruneError as error:
        assert "time limit" in str(error)
    else:
        assert solution.status == "stopped"
        assert solution.gap > 1e-4
    assert time.monotonic() - started < 8


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_the_search_and_its_child(tmp_path: Path, how: signal.Signals) -> None:
    hard().to_json(tmp_path / "problem.json")
    code = (
        "import signal, sys\nfrom edgeprune.solve import Problem, solve\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell hands down that it is ignored
        "try: solve(Problem.from_json(sys.argv[1]))\nexcept KeyboardInterrupt: sys.exit(7)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "problem.json")])
    try:
        limit = time.monotonic() + 10
        while not (children := children_of(parent.pid)) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(1.5)  # well inside HiGHS
        assert parent.poll() is None
        interrupted = time.monotonic()
        os.kill(parent.pid, how)
        assert parent.wait(timeout=10) == (7 if how == signal.SIGINT else -how)
        assert time.monotonic() - interrupted < 4
        while any(map(alive, children)) and time.monotonic() - interrupted < 4:
            time.sleep(0.02)
        assert not any(map(alive, children))
    finally:
        parent.kill()
        parent.wait()


def test_a_finished_search_leaves_no_child() -> None:
    solve(chain(6, 5))
    if Path("/proc/self/task").exists():
        assert children_of(os.getpid()) == []


def test_importing_the_solver_imports_no_torch_and_no_scipy() -> None:
    code = "import sys, edgeprune.solve; print([m for m in ('torch', 'scipy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_example_of_the_documentation_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "solver.md"
    outcome = doctest.testfile(str(page), module_relative=False)
    assert outcome.attempted > 3
    assert outcome.failed == 0


# Files


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_a_problem_comes_back_from_its_file_bit_for_bit(tmp_path: Path, problem: Problem) -> None:
    problem.to_json(tmp_path / "problem.json")
    again = Problem.from_json(tmp_path / "problem.json")
    assert (again.variables, again.budgets) == (problem.variables, problem.budgets)
    for a, b in zip(again.factors, problem.factors, strict=True):
        assert a.variables == b.variables
        np.testing.assert_array_equal(a.value, b.value)
        assert a.cost.keys() == b.cost.keys()
        for budget, cost in a.cost.items():
            np.testing.assert_array_equal(cost, b.cost[budget])
    assert [path.name for path in tmp_path.iterdir()] == ["problem.json"]


GOOD: dict[str, Any] = {
    "schema": 1,
    "variables": {"x": 2, "y": 1},
    "budgets": {"us": 3.0},
    "factors": [{"variables": ["x", "y"], "value": [[0], [1]], "cost": {"us": [[0], [None]]}}],
    "comment": "other keys may stand beside these",
}


def test_null_is_a_forbidden_combination(tmp_path: Path) -> None:
    (tmp_path / "problem.json").write_text(json.dumps(GOOD))
    assert Problem.from_json(tmp_path / "problem.json").factors[0].cost["us"].tolist() == [[0.0], [INF]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: found 2, expected 1"),
        ({"variables": {"x": 0}}, "variables.x: found 0, expected a whole number of options"),
        ({"variables": []}, "variables: found [], expected an object"),
        ({"budgets": {"us": -1}}, "budgets.us: found -1, expected a number above 0"),
        ({"factors": {}}, "factors: found {}, expected a list"),
        ({"factors": [3]}, "factors[0]: found 3, expected an object"),
        ({"factors": [{"variables": ["x"]}]}, "factors[0].value: missing"),
        ({"factors": [{"variables": ["z"], "value": [1]}]}, 'factors[0].variables: found "z"'),
        ({"factors": [{"variables": [], "value": []}]}, "factors[0].variables: found [], expected 1 to 3"),
        ({"factors": [{"variables": ["x"], "value": [1]}]}, "factors[0].value: found 1 entries, expected 2"),
        ({"factors": [{"variables": ["x"], "value": [1, None]}]}, "factors[0].value[1]: found null, expected a number"),
        ({"factors": [{"variables": ["x"], "value": [1, "2"]}]}, 'factors[0].value[1]: found "2"'),
        ({"factors": [{"variables": ["x"], "value": [1, 2], "cost": {"ms": [1, 2]}}]}, "factors[0].cost.ms: no such"),
        (
            {"factors": [{"variables": ["x", "y"], "value": [[1], [2]], "cost": {"us": [[1], 2]}}]},
            "factors[0].cost.us[1]: found 2, expected 1, one for each option",
        ),
    ],
)
def test_a_bad_file_is_named_with_place_and_expectation(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(InputError) as caught:
        Problem.from_json(path)
    assert str(caught.value).startswith(f"{path}:")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "problem.json:1: not JSON"),
        ('{"schema": 1, "variables": {"x": 1, "x": 2}}', "'x' stands twice"),
        ('{"schema": NaN}', "NaN is not a JSON number"),
        ("[]", "found [], expected an object"),
        ('{"schema": 1, "variables": {}, "budgets": {"us": 1e999}, "factors": []}', "too large for float64"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "problem.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Problem.from_json(tmp_path / "problem.json")
    assert message in str(caught.value)


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Problem.from_json(tmp_path / "problem.json")
    with pytest.raises(StorageError, match="cannot write"):
        knapsack(1).to_json(tmp_path / "nowhere" / "problem.json")


# A caller's bad arguments


def factor(**changes: Any) -> Factor:
    return Factor(**({"variables": ("x",), "value": [1.0, 2.0], "cost": {"us": [1.0, 2.0]}} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": ("x", "x")}, "1 to 3 different variables"),
        ({"variables": ("x", "y")}, r"value has shape \(2,\); expected 2 axes"),
        ({"value": [1.0, math.nan]}, r"value\[1\] is not finite"),
        ({"value": [[1.0], [1.0, 2.0]]}, "not an array of numbers"),
        ({"cost": {"us": [1.0]}}, r"cost 'us' has shape \(1,\), value has \(2,\)"),
        ({"cost": {"us": [1.0, math.nan]}}, r"cost 'us'\[1\] is nan; expected a number or \+inf"),
        ({"cost": {"us": [1.0, -INF]}}, r"is -inf"),
    ],
)
def test_a_bad_factor(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factor(**changes)


@pytest.mark.parametrize(
    ("variables", "budgets", "message"),
    [
        ({"x": 3}, {"us": 1}, r"factor 0 \('x',\): tables of shape \(2,\); the variables' options give \(3,\)"),
        ({"xx": 2}, {"us": 1}, "unknown variable 'x'; did you mean 'xx'"),
        ({"x": 2}, {"ms": 1}, "cost of unknown budget 'us'"),
        ({"x": 2}, {"us": 0}, "budget 'us' is 0; expected a number above 0"),
        ({"x": 2}, {"us": math.nan}, "budget 'us' is nan"),
        ({"x": 0}, {"us": 1}, "variable 'x' has 0 options"),
    ],
)
def test_a_bad_problem(variables: dict[str, int], budgets: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(variables=variables, budgets=budgets, factors=[factor()])


@pytest.mark.parametrize("arguments", [{"gap": -1.0}, {"gap": math.nan}, {"time_limit_s": 0.0}])
def test_bad_arguments_of_solve(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        solve(knapsack(1), **arguments)  # type: ignore[arg-type]


def test_the_solution_as_a_document() -> None:
    document = solve(knapsack(4)).to_document()
    assert set(document) == set(Solution.__dataclass_fields__)
    assert document["choice"] == {"a": 0, "b": 1, "c": 1}
    json.dumps(document, allow_nan=False)
