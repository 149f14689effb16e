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

def softmaxes():
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)) for _ in range(5)))

def hidden_between_softmaxes():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.Softmax(-1), *softmaxes())

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = 3, 0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 36), nn.Linear(12, 8)
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        n, t, _ = x.shape
        x = self.embed(x)
        y = self.qkv(self.norm(x)).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = y[0] @ y[1].transpose(-1, -2) * self.scale
        return self.head(x + self.proj((scores.softmax(-1) @ y[2]).transpose(1, 2).reshape(n, t, -1)))
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
    assert document["groups"][0]["blocks"] == [""]
    assert document["groups"][1]["blocks"] == []
    assert [group["granularity"] for group in document["groups"]] == [1, 1]
    assert document["blocks"] == [{"id": "", "ends_in": "b", "inside": ["a.bias:0"], "within": None}]
    assert document["tracer"] == "recording"
    (refusal,) = document["refused"]
    assert refusal == {"operator": "output", "where": "head", "reason": "the model's output keeps its shape"}
    assert document["prunable_macs_share"] == document["prunable_params_share"] == 1.0
    assert set(document["seconds"]) == {"trace", "analysis"}


def test_the_text_names_groups_blocks_and_refusals(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:residual", "--input", "float32:1x3x8x8"]) == 0
    text = capsys.readouterr().out
    assert "2 groups, 1 blocks droppable, 1 refused; 100.0% of MACs" in text
    assert "       6        1        3  a.bias:0  (in block (the model itself))" in text
    assert "     1  output: the model's output keeps its shape\n        at head\n" in text


def test_a_head_is_its_width_wide_and_a_norm_changes(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """3 heads of 4, in queries, keys and values: a head takes 4 inputs of the projection, a width 9 outputs of qkv."""
    assert main(["inspect", f"{factory}:Attention", "--shape", "2x5x8", "--json"]) == 0
    groups = {group["id"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    assert {(g["num_channels"], g["granularity"], g["changes_statistics"]) for g in groups.values()} == {
        (3, 4, False),
        (4, 9, False),
        (8, 1, True),
    }
    assert main(["inspect", f"{factory}:Attention", "--shape", "2x5x8"]) == 0
    assert "(changes statistics)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["softmaxes", "hidden_between_softmaxes"])
def test_equal_reasons_are_shown_once(name: str, factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As an error and beside what can be pruned; -v and --json name every place."""
    code = int(name == "softmaxes")
    reason = "softmax: it works along a dimension that holds channels"
    assert main(["inspect", f"{factory}:{name}", "--shape", "2x8"]) == code
    brief = "".join(capsys.readouterr())
    assert brief.count(reason) == 1
    assert "and 2 more (-v shows them)" in brief or "and 3 more (-v shows them)" in brief
    assert main(["inspect", f"{factory}:{name}", "--shape", "2x8", "-v"]) == code
    full = "".join(capsys.readouterr())
    assert "more (-v" not in full
    assert main(["inspect", f"{factory}:{name}", "--shape", "2x8", "--json"]) == code
    out = capsys.readouterr().out
    assert out.count(reason if code else "it works along a dimension that holds channels") >= 5


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
