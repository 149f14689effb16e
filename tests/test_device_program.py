"""The device program: light, self-contained, and deaf to what a runtime prints."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeprune.backends import backend_names, find_backend
from edgeprune.device_core import Program, serve
from edgeprune.device_program import CORE, assemble, self_contained
from edgeprune.device_state import Tree, board_facts, cpu_facts
from edgeprune.device_statistics import median
from edgeprune.remote_channel import BOOT

pytestmark = pytest.mark.unit

RUNTIMES = {
    "openvino": {"openvino", "numpy"},
    "onnxruntime": {"onnxruntime", "numpy"},
    "tflite": {"ai_edge_litert", "tflite_runtime", "numpy"},
    "tensorrt_python": {"tensorrt", "tensorrt_rtx"},
}


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).split(".")[0])
    return names


def test_core_imports_the_standard_library_only() -> None:
    assert imported(self_contained(CORE)) <= sys.stdlib_module_names


def test_the_first_half_imports_the_standard_library_only() -> None:
    source = BOOT.read_text()
    assert imported(source) <= sys.stdlib_module_names
    ast.parse(source, feature_version=(3, 8))
    assert "\0" not in source  # where the loader stops reading


@pytest.mark.parametrize("name", backend_names())
def test_runner_imports_its_runtime_only(name: str) -> None:
    runner = self_contained(find_backend(name).runner_path())
    assert imported(runner) <= sys.stdlib_module_names | RUNTIMES.get(name, set())


def test_parts_beside_a_runner_are_pasted_in_once(tmp_path: Path) -> None:
    """The runner and one part both use the other part; nothing of the package is imported over there."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "runner.py").write_text(
        '"""A runner."""\nfrom __future__ import annotations\nimport math\n'
        "from pkg.mine.runner_a import (\n    half,\n)\n"
        "from pkg.mine.runner_b import TWO\nNAME = 'x'\ndef version(): return str(math.floor(half(TWO)))\n"
    )
    (folder / "runner_a.py").write_text(
        '"""A part."""\nfrom __future__ import annotations\n'
        "from pkg.mine.runner_b import TWO\ndef half(x): return x / TWO\n"
    )
    (folder / "runner_b.py").write_text('"""Another."""\nTWO = 2\n')
    text = self_contained(folder / "runner.py")
    assert text.count("TWO = 2") == text.count("def half") == text.count("from __future__") == 1
    assert imported(text) <= sys.stdlib_module_names
    (hello,) = converse(assemble({"x": folder / "runner.py"}).text, [{"id": 1, "op": "hello"}], "x")
    assert hello["version"] == "1"
    (folder / "runner_b.py").write_text("TWO = 2\nNAME = 'y'\n")
    with pytest.raises(ValueError, match="its parts define NAME twice"):
        self_contained(folder / "runner.py")
    (folder / "runner.py").write_text("from pkg.mine.runner_b import TWO as DOS\n")
    with pytest.raises(ValueError, match=r"runner.py:1: a part is imported by its names"):
        self_contained(folder / "runner.py")


def test_a_runner_of_one_file_goes_over_as_it_is() -> None:
    runner = find_backend("null").runner_path()
    assert self_contained(runner) == runner.read_text()


def test_program_is_python_3_8() -> None:
    program = assemble({name: find_backend(name).runner_path() for name in backend_names()})
    ast.parse(program.text, feature_version=(3, 8))
    for name in backend_names():
        ast.parse(self_contained(find_backend(name).runner_path()), feature_version=(3, 8))


def test_hash_follows_the_text() -> None:
    null = find_backend("null").runner_path()
    openvino = find_backend("openvino").runner_path()
    assert assemble({"null": null}) == assemble({"null": null})
    assert assemble({"null": null}).hash != assemble({"null": openvino}).hash


def converse(
    program: str, requests: list[object], runner: str, python: str = sys.executable
) -> list[dict[str, object]]:
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    with tempfile.TemporaryDirectory() as folder:  # it leaves a note there
        done = subprocess.run(
            [python, "-I", "-u", "-c", program, runner],
            input=lines,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=folder,
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


CHATTY = """
import os
NAME = "chatty"
print("import chatter")
def version():
    os.write(1, b"raw chatter")
    print("more")
    return "1"
"""


def test_chatter_of_the_runtime_stays_out_of_the_answers(tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text(CHATTY)
    program = assemble({"chatty": runner})
    (hello, unknown, bye) = converse(
        program.text, [{"id": 1, "op": "hello"}, {"id": 2, "op": "dance"}, {"id": 3, "op": "bye"}], "chatty"
    )
    assert hello["program"] == program.hash
    assert hello["id"] == 1
    assert "unknown operation 'dance'" in str(unknown["error"])
    assert bye == {"id": 3}


def test_runtime_that_is_not_there_is_an_answer(tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text("import no_such_runtime\n")
    (answer,) = converse(assemble({"x": runner}).text, [{"id": 1, "op": "hello"}], "x")
    assert "no_such_runtime" in str(answer["error"])


def test_runtime_that_the_user_installed_for_himself_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install --user`, which `python -I` leaves out."""
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "mine"))
    site = tmp_path / "mine" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    (site / "my_own_runtime.py").write_text("VERSION = '7'\n")
    runner = tmp_path / "runner.py"
    runner.write_text("import my_own_runtime\nNAME = 'x'\ndef version(): return my_own_runtime.VERSION\n")
    (hello,) = converse(assemble({"x": runner}).text, [{"id": 1, "op": "hello"}], "x")
    assert hello["version"] == "7"


@pytest.mark.parametrize("version", ["3.8", "3.10", "3.12", "3.13"])
def test_program_runs_under_other_pythons(version: str, tmp_path: Path) -> None:
    homes = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    if not homes:
        pytest.skip(f"no Python {version} under ~/.pyenv/versions")
    model = tmp_path / "model.json"
    kernel = {"name": "k", "type": "conv", "time_us": 40.0}
    spec = [{"name": "x", "dtype": "float32", "shape": [1, 4]}]
    document = {"schema": 1, "factor": 1.0, "offset_us": 2.0, "kernels": [kernel], "inputs": spec, "outputs": spec}
    model.write_text(json.dumps(document))
    timing: dict[str, object] = {
        "warmup_ms": 1,
        "burst_ms": 1,
        "untimed_runs": 2,
        "min_runs": 4,
        "min_rounds": 2,
        "max_rounds": 3,
    }
    timing |= {"max_seconds": 5, "tolerance": 0.01, "settle_alone": False, "burst_percentile": 50.0}
    answers = converse(
        assemble({"null": find_backend("null").runner_path()}).text,
        [
            {"id": 1, "op": "load", "key": "a", "path": str(model), "options": {}},
            {
                "id": 2,
                "op": "measure",
                "candidates": ["a"],
                "references": [],
                "anchors": {},
                "timing": timing,
                "seed": 0,
            },
        ],
        "null",
        str(homes[-1]),
    )
    times = answers[-1]["times_us"]
    assert isinstance(times, dict)
    assert {time for burst in times["a"] for time in burst} == {42.0}


class Scripted:
    """A runner whose runs take the times of a list, over and over."""

    NAME = "scripted"

    def __init__(self, times: list[float]) -> None:
        self.times = times
        self.count = 0

    def timed_run(self, handle: object) -> float:
        self.count += 1
        return self.times[self.count % len(self.times)]

    def fill(self, handle: object, seed: int) -> None: ...


def measured(times: list[float], **changes: object) -> dict[str, list[list[float]]]:
    program = Program(Scripted(times), "hash", lambda message: None)
    program.handles = {"a": 1, "ref": 2}
    timing: dict[str, object] = {
        "warmup_ms": 0,
        "burst_ms": 0,
        "untimed_runs": 2,
        "min_runs": 4,
        "min_rounds": 3,
        "max_rounds": 9,
    }
    timing |= {"max_seconds": 5, "tolerance": 0.01, "settle_alone": False, "burst_percentile": 50.0} | changes
    request = {"candidates": ["a"], "references": ["ref"], "anchors": {"a": "ref"}, "timing": timing, "seed": 1}
    result: dict[str, list[list[float]]] = program.op_measure(request)["times_us"]
    return result


def test_steady_times_stop_at_the_fewest_rounds_and_bursts_have_the_fewest_runs() -> None:
    assert measured([5.0]) == {"a": [[5.0] * 4] * 3, "ref": [[5.0] * 4] * 3}


def test_burst_lasts_at_least_its_time() -> None:
    assert {len(burst) for burst in measured([5.0], burst_ms=0.1)["a"]} == {20}


def test_unsteady_times_go_on_to_the_most_rounds() -> None:
    assert len(measured([1.0 + (37 * n) % 101 for n in range(101)])["a"]) == 9


class InBursts:
    """A runner that is timed from inside: 7 us a run, four more runs than asked for."""

    NAME = "bursts"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def burst(self, handle: object, untimed: int, runs: int) -> list[float]:
        self.asked.append((untimed, runs))
        if handle == "broken":
            raise RuntimeError("it broke")
        return [7.0] * (runs + 4)

    def fill(self, handle: object, seed: int) -> None: ...


def test_a_runner_with_bursts_of_its_own_is_asked_for_nothing_else() -> None:
    """One to size the others: 4 runs that show 7 us, so 15 to fill 0.1 ms; `warmup_ms` is its own affair."""
    runner = InBursts()
    program = Program(runner, "hash", lambda message: None)
    program.handles = {"a": 1}
    timing = {"warmup_ms": 1e9, "burst_ms": 0.1, "untimed_runs": 2, "min_runs": 4, "min_rounds": 3, "max_rounds": 9}
    timing |= {"max_seconds": 5, "tolerance": 0.01, "settle_alone": False, "burst_percentile": 50.0}
    request = {"candidates": ["a"], "references": [], "anchors": {}, "timing": timing, "seed": 1}
    answer = program.op_measure(request)
    assert answer["times_us"] == {"a": [[7.0] * 19] * 3}
    assert answer["modelled"] is False
    assert runner.asked == [(2, 4), (2, 15), (2, 15), (2, 15)]


def test_an_error_names_the_model_that_was_run() -> None:
    """Not the last one that was warmed up: of a batch only the one that broke is to blame."""
    answers: list[dict[str, object]] = []
    program = Program(InBursts(), "hash", answers.append)
    program.handles = {"a": 1, "b": "broken", "c": 1}
    timing = {"warmup_ms": 0, "burst_ms": 0, "untimed_runs": 2, "min_runs": 4, "min_rounds": 3, "max_rounds": 9}
    request = {"id": 1, "op": "measure", "candidates": ["a", "b", "c"], "references": [], "anchors": {}, "seed": 1}
    serve(program, [json.dumps(request | {"timing": timing})], answers.append)
    assert answers[-1]["key"] == "b"
    assert answers[-1]["error"] == "it broke"


def test_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_a_line_that_is_no_json_is_answered() -> None:
    answers: list[dict[str, object]] = []
    serve(Program(Scripted([1.0]), "hash", answers.append), ["nonsense\n", '{"id": 7, "op": "bye"}\n'], answers.append)
    assert "error" in answers[0]
    assert answers[1] == {"id": 7}


def test_cpu_facts_name_this_machine() -> None:
    facts = cpu_facts()
    assert facts["cores"] >= 1
    assert facts["machine"]


def test_the_program_tells_its_state_and_holds_no_clocks_where_there_are_none() -> None:
    """In the one file that goes over, under the oldest Python too where it is here."""
    program = assemble({"null": find_backend("null").runner_path()}).text
    requests: list[object] = [
        {"id": number, "op": op} for number, op in enumerate(("hello", "state", "hold_clocks", "bye"))
    ]
    for python in [sys.executable, *map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python"))]:
        hello, state, held, bye = converse(program, requests, "null", python)
        assert hello["board"] == board_facts(Tree())
        assert {"facts", "state", "slowed", "slowed_before", "packages", "disk_free_mb"} <= set(state)
        assert "error" in held or held["held"] is not None
        assert bye == {"id": 3}
