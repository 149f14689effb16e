"""`edgeprune prune`: budgets, constraints, scopes, schedules, fronts and rewinding, on the null device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.cli import main
from edgeprune.errors import InputError
from edgeprune.front import parse_front
from edgeprune.models import resolve
from edgeprune.plan_json import Plan
from edgeprune.surgery import apply

pytestmark = pytest.mark.integration
MODEL = "tests.small_models:plain"
X = (torch.zeros(1, 3, 32, 32),)


@pytest.fixture
def two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second null device beside the shipped one."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "devices.yaml").write_text(
        'schema: 1\ndevices:\n  other:\n    backend: "null"\n    aliases: [elsewhere]\n'
    )
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", str(folder))


def run(out: Path, *options: str) -> int:
    fixed = ["prune", MODEL, "--shape", "1x3x32x32", "--device", "null", "--saliency", "l2", "--out", str(out)]
    return main([*fixed, *options])


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def parameters(plan: Path) -> int:
    """Of the network that the plan leaves."""
    module = apply(Plan.from_json(plan), resolve(MODEL), X).module
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_budget_is_kept_and_told(two_devices: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    budgets = ["0.7x", "0.5x@elsewhere", "0.3x@params", "0.9x@macs"]
    assert run(out, *[word for budget in budgets for word in ("--budget", budget)], "--json") == 0
    told = document(capsys)["budgets"]
    assert [each["of"] for each in told] == ["null", "other", "params", "macs"]
    assert [each["unit"] for each in told] == ["ms", "ms", "parameters", "MACs"]
    assert all(each["predicted"] <= each["limit"] <= each["dense"] for each in told)
    assert told[0]["origin"] == told[1]["origin"] == "predicted from modelled kernels"
    assert told[2]["predicted"] == parameters(out) <= 0.3 * told[2]["dense"]
    assert Plan.from_json(out).notes["budgets"] == told


def test_a_person_reads_every_budget_and_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "plan.json", "--budget", "0.7x", "--budget", "200kB@params") == 0
    shown = capsys.readouterr().out
    assert "proven within" in shown and "widths on the steps of null's table: 16 to 16 channels" in shown
    assert "  params: " in shown and "bytes of 200000, dense" in shown and "(counted)" in shown


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--budget", "0.5x@nul"], 2, "did you mean 'null'"),
        (["--budget", "0.5x@params"], 2, "give --budget for the latency on null or --pareto"),
        (["--budget", "0.5x", "--budget", "8ms@null"], 2, "two budgets of null"),
        (["--budget", "0.5x", "--pareto", "0.3x:0.9x:3"], 2, "one of the two"),
        (["--budget", "0.5x", "--plot", "front.png"], 2, "--plot draws a front"),
        (["--budget", "0.5x", "--keep", "0.0.wieght"], 2, "did you mean '0.0.weight'"),
        (["--budget", "0.5x", "--keep", "*"], 2, "leave nothing to prune"),
        (["--budget", "0.5x", "--least-width", "wide"], 2, "neither a number of channels"),
        (["--budget", "0.5x", "--only", "heads"], 2, "no attention heads"),
        (["--budget", "0.5x", "--steps", "3"], 2, "--schedule iterative"),
        (["--budget", "0.5x", "--targets", "linear"], 2, "oneshot has one budget"),
        (["--budget", "0.5x", "--scope", "uniform", "--only", "blocks"], 2, "drops no blocks"),
        (["--budget", "0.5x", "--rewind", "nowhere.pth"], 2, "no such file"),
        (["--budget", "0.9x", "--budget", "10@params"], 3, "can't be met together"),
        (["--pareto", "0.001x:0.002x:2"], 3, "no budget of the front can be met"),
    ],
)
def test_each_fault_has_its_exit_code_and_message(
    options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan"
    assert run(out, *options) == code
    assert message in capsys.readouterr().err
    assert not out.is_file() and not list(tmp_path.rglob("*.json"))


def test_constraints_scope_and_schedule_stand_in_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    options = ["--budget", "0.6x", "--keep", "1.*", "--least-width", "25%", "--schedule", "iterative", "--steps", "2"]
    assert run(out, *options, "--scope", "isomorphic", "--targets", "linear", "--json") == 0
    assert document(capsys)["scope"] == "isomorphic"
    plan = Plan.from_json(out)
    assert plan.notes["constraints"] == {"keep": ["1.*"], "least_width": 0.25}
    assert plan.notes["schedule"] == {"steps": 2, "targets": "linear"}
    module = apply(plan, resolve(MODEL), X).module
    assert module.get_parameter("1.0.weight").shape == (96, 64, 3, 3), "neither inputs nor outputs went"
    assert module.get_parameter("2.0.weight").shape[0] >= 24


@pytest.mark.parametrize("scope", ["uniform", "local"])
def test_the_baselines_say_that_nothing_is_proven(
    scope: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "plan.json", "--budget", "0.6x", "--scope", scope, "--json") == 0
    found = document(capsys)
    assert found["gap"] is None and found["predicted_ms"] <= 0.6 * found["dense_predicted_ms"] * 1.0001
    assert run(tmp_path / "plan.json", "--budget", "0.6x", "--scope", scope) == 0
    assert "by one share, nothing proven" in capsys.readouterr().out


def test_the_front_is_a_folder_of_plans_one_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "front", tmp_path / "front.png"
    assert run(out, "--pareto", "0.3x:0.9x:4", "--plot", str(plot)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ratio", "predicted", "ms", "value", "gap", "plan"]
    assert [line.split("x")[0].strip() for line in lines[1:]] == ["0.3", "0.5", "0.7", "0.9"]
    found = json.loads((out / "front.json").read_text())
    values = [point["value"] for point in found["points"]]
    assert values == sorted(values) and len(set(values)) == 4, "more latency, more value"
    for point in found["points"]:
        assert point["predicted_ms"] <= point["ratio"] * found["dense_predicted_ms"] * 1.0001
        assert point["gap"] <= 1e-4 and point["exact_cost"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path / "alone.json", "--budget", "0.5x") == 0
    assert Plan.from_json(tmp_path / "alone.json").kept == Plan.from_json(out / "plan_0.5.json").kept


def test_a_front_goes_on_where_some_of_it_is_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "front", "--pareto", "0.01x:0.9x:3", "--json") == 0
    least, *others = document(capsys)["points"]
    assert least["plan"] is None and "floor is set by" in least["why"]
    assert all((tmp_path / "front" / point["plan"]).is_file() for point in others)


def test_a_front_is_read() -> None:
    assert parse_front("0.3x:0.9x:4") == (0.3, 0.5, 0.7, 0.9)
    assert parse_front("0.5:1:2") == (0.5, 1.0)
    wrong_bounds = ("0.9x:0.3x:4", "0.3x:1.2x:3", "0:0.5x:3", "0.00001:0.9:2", "0.1:0.1002:9")
    for wrong in (*wrong_bounds, "0.3x:0.9x:1", "0.3x-0.9x", "0.3..1:0.9:3"):
        with pytest.raises(InputError, match="front"):
            parse_front(wrong)


def test_a_plan_from_trained_weights_cuts_the_initial_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    initial = resolve(MODEL)
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape))
    torch.save(initial.state_dict(), tmp_path / "initial.pth")
    out = tmp_path / "plan.json"
    assert run(out, "--budget", "0.5x", "--rewind", str(tmp_path / "initial.pth"), "--json") == 0
    path = Path(document(capsys)["rewound"])
    assert path == tmp_path / "plan.safetensors"
    plan = Plan.from_json(out)
    first = plan.kept["0.0.weight:0"] if "0.0.weight:0" in plan.kept else tuple(range(64))
    assert load_file(path)["0.0.weight"].equal(initial.get_parameter("0.0.weight")[list(first)])


def test_rewound_weights_never_overwrite_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    initial = tmp_path / "initial.safetensors"
    save_file(resolve(MODEL).state_dict(), initial)
    before = initial.read_bytes()
    assert run(tmp_path / "initial.json", "--budget", "0.5x", "--rewind", str(initial)) == 2
    assert "name another --out" in capsys.readouterr().err
    assert initial.read_bytes() == before and sorted(tmp_path.iterdir()) == [initial]


def test_a_front_in_steps_is_solved_point_by_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each point's last step offers other widths than its neighbour's, so nothing is started from that."""
    out = tmp_path / "front"
    assert run(out, "--pareto", "0.4x:0.8x:3", "--schedule", "iterative", "--steps", "2", "--json") == 0
    assert all(point["plan"] for point in document(capsys)["points"])


def test_other_weights_that_do_not_fit_are_refused_before_anything_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"nobody": torch.zeros(2)}, tmp_path / "other.pth")
    assert run(tmp_path / "plan.json", "--budget", "0.5x", "--rewind", str(tmp_path / "other.pth")) == 2
    assert "don't fit the model" in capsys.readouterr().err


def test_fit_keeps_parameters_and_refuses_latency_elsewhere(
    two_devices: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["fit", MODEL, "--shape", "1x3x32x32", "--device", "null", "--saliency", "l2", "--out", str(tmp_path)]
    assert main([*fixed, "--budget", "0.7x", "--budget", "0.3x@params", "--json"]) == 0
    found = document(capsys)
    assert found["met"] and found["pruned"]["ratio"] <= 0.7
    (params,) = found["budgets"]
    assert params["predicted"] <= params["limit"] == round(0.3 * params["dense"])
    assert parameters(Path(found["bundle"]) / "plan.json") == params["predicted"]
    assert main([*fixed, "--budget", "0.7x", "--budget", "8ms@other"]) == 2
    assert "fit measures on null alone" in capsys.readouterr().err
    assert main([*fixed, "--budget", "0.7x", "--budget", "10@params"]) == 3
    assert "can't be met together" in capsys.readouterr().err
    assert main([*fixed, "--budget", "0.3x@params"]) == 2
    assert "no --budget is of the latency on null" in capsys.readouterr().err


def test_fit_in_steps_meets_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["fit", MODEL, "--shape", "1x3x32x32", "--device", "null", "--saliency", "l2", "--out", str(tmp_path)]
    assert main([*fixed, "--budget", "0.5x", "--schedule", "iterative", "--steps", "3", "--json"]) == 0
    found = document(capsys)
    assert found["met"] and found["pruned"]["ratio"] <= 0.5
    plan = Plan.from_json(Path(found["bundle"]) / "plan.json")
    assert plan.notes["schedule"] == {"steps": 3, "targets": "exponential"}


def test_fit_cuts_a_network_that_is_fast_enough_but_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["fit", MODEL, "--shape", "1x3x32x32", "--device", "null", "--saliency", "l2", "--out", str(tmp_path)]
    assert main([*fixed, "--budget", "1000ms", "--budget", "0.5x@params", "--json"]) == 0
    (params,) = document(capsys)["budgets"]
    assert params["predicted"] <= 0.5 * params["dense"]


def test_fit_tells_every_budget_of_a_dense_network_that_is_inside_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["fit", MODEL, "--shape", "1x3x32x32", "--device", "null", "--saliency", "l2", "--out", str(tmp_path)]
    assert main([*fixed, "--budget", "1000ms", "--budget", "1x@params", "--json"]) == 0
    (params,) = document(capsys)["budgets"]
    assert params["predicted"] == params["dense"] == params["limit"]
