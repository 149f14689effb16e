"""`edgeprune inspect`: what can be pruned, and what can't and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.cli import main

pytestmark = pytest.mark.unit

FACTORY = """
from torch import nn

def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.b(self.a(x).relu())).mean((2, 3)))

    return Residual()

def nested():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.stem(x)
            y = self.a(x)
            return self.head((x + (y + self.b(y))).mean((2, 3)))

    return Nested()

def linear():
    return nn.Linear(3, 4)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "small_models_to_inspect.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "small_models_to_inspect"


def test_the_document_has_its_keys(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:residual", "--shape", "1x3x8x8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == f"{factory}:residual"
    assert {group["id"]: group["num_channels"] for group in document["groups"]} == {"a.bias:0": 6, "a.weight:1": 8}
    trunk = document["groups"][1]["members"]
    assert {"parameter": "head.weight", "dim": 1, "role": "consumer"} in trunk
    assert document["blocks"] == [{"id": "", "ends_in": "b", "inside": ["a.bias:0"], "within": None}]
    (refusal,) = document["refused"]
    assert refusal == {"operator": "output", "where": "head", "reason": "the model's output keeps its shape"}
    assert document["prunable_macs_share"] == document["prunable_params_share"] == 1.0
    assert set(document["seconds"]) == {"trace", "analysis"}


def test_the_text_names_groups_blocks_and_refusals(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:residual", "--input", "float32:1x3x8x8"]) == 0
    text = capsys.readouterr().out
    assert "2 groups, 1 blocks droppable, 1 refused; 100.0% of MACs" in text
    assert "a.bias:0" in text
    assert "head: output: the model's output keeps its shape" in text


def test_a_block_names_the_block_around_it(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:nested", "--shape", "1x3x8x8", "--json"]) == 0
    inner, outer = json.loads(capsys.readouterr().out)["blocks"]
    assert inner == {"id": ":0", "ends_in": "b", "inside": [], "within": ":1"}
    assert (outer["ends_in"], outer["within"]) == ("a + b", None)
    assert main(["inspect", f"{factory}:nested", "--shape", "1x3x8x8"]) == 0
    assert ":0  (b; 0; :1)\n:1  (a + b; 0)" in capsys.readouterr().out


def test_a_model_without_anything_to_prune_is_an_error_that_says_why(
    factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", f"{factory}:linear", "--shape", "1x3", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "refused"
    assert "the model's output keeps its shape" in error["message"]


def test_a_shape_is_needed(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:residual"]) == 2
    assert "--shape" in capsys.readouterr().err
