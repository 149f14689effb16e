"""The quality gate: what is asked for, what is refused, and that nothing is left when it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgeprune as ep
from edgeprune.budget import parse_budget
from edgeprune.cli import main
from edgeprune.data import as_data, synthetic
from edgeprune.errors import InputError, QualityError
from edgeprune.exporting import as_pruned, export
from edgeprune.gating import MinQuality, engine_function, parse_min_quality, quality_of
from edgeprune.pipeline import fit
from edgeprune.preparing import Task
from edgeprune.quality import Quality
from edgeprune.transport import open_session
from tests.small_models import plain

pytestmark = [pytest.mark.integration, pytest.mark.timed]
X = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("top1:0.9", "top1", 0.9),
        ("agreement:95%", "agreement", 0.95),
        ("0.5", None, 0.5),
        ("90%", None, 0.9),
        ("kl:2.5", "kl", 2.5),
        ("relative_error:.1", "relative_error", 0.1),
    ],
)
def test_what_is_asked_for(text: str, metric: str | None, value: float) -> None:
    assert parse_min_quality(text) == MinQuality(metric=metric, value=value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("good", "not understood: expected METRIC:VALUE"),
        ("top1:", "not understood"),
        ("top2:0.9", r"no metric 'top2'; did you mean 'top1'\?"),
        ("top1:90", "a share lies between 0 and 1"),
        ("-0.1", "not understood"),
    ],
)
def test_what_is_not_understood_says_why(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_min_quality(text)


def test_shares_are_least_values_and_distances_largest_ones() -> None:
    found = Quality(n=10, top1=0.8, agreement=0.9, kl=0.2, relative_error=0.3)
    MinQuality(metric="top1", value=0.8).check(found)
    MinQuality(metric="kl", value=0.2).check(found)
    with pytest.raises(QualityError, match="top1 is 0.8 on 10 samples, at least 0.81 was asked for") as error:
        MinQuality(metric="top1", value=0.81).check(found)
    assert error.value.exit_code == 7
    with pytest.raises(QualityError, match="kl is 0.2 on 10 samples, at most 0.1 was asked for"):
        MinQuality(metric="kl", value=0.1).check(found)
    with pytest.raises(InputError, match="no classification, so it has no agreement"):
        MinQuality(metric="agreement", value=0.1).check(Quality(n=1, relative_error=0.5))


def test_a_number_alone_is_top1_with_labels_and_agreement_without() -> None:
    labelled = as_data([(torch.zeros(2, 3), torch.tensor([0, 1]))])
    bare = synthetic((1, 3), count=2)
    assert MinQuality(metric=None, value=0.5).named(labelled).metric == "top1"
    assert MinQuality(metric=None, value=0.5).named(bare).metric == "agreement"
    with pytest.raises(InputError, match="needs labels, the data has none"):
        MinQuality(metric="top1", value=0.5).named(bare)
    with pytest.raises(InputError, match="needs data to judge by: give it with --data"):
        MinQuality(metric=None, value=0.5).named(None)


def test_fit_hands_nothing_over_below_the_gate_and_says_the_quality(tmp_path: Path) -> None:
    def task(least: str) -> Task:
        data = synthetic(X[0].shape, count=24)
        model = plain().eval()
        device = ep.load_device("null")
        wanted = parse_min_quality(least)
        return Task(model=model, name="plain", example_inputs=X, device=device, data=data, min_quality=wanted)

    with pytest.raises(QualityError, match=r"relative_error is [0-9.]+ on \d+ samples, at most 1e-09 was asked for"):
        fit(task("relative_error:0.000000001"), parse_budget("0.6x"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert fit(task("relative_error:1000"), parse_budget("0.6x"), tmp_path / "bundle").verification.met


def test_fit_in_int8_wants_data_before_anything_is_measured(tmp_path: Path) -> None:
    from edgeprune.device import in_precision

    device = in_precision(ep.load_device("host-onnxruntime"), "int8")
    task = Task(model=plain().eval(), name="plain", example_inputs=X, device=device)
    with pytest.raises(InputError, match="int8 needs calibration data"):
        fit(task, parse_budget("0.6x"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_judged_on_batches_smaller_than_its_own(tmp_path: Path) -> None:
    model = plain().eval()
    x = (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)
    device = ep.load_device("host-onnxruntime")
    engine = export(as_pruned(model, x), device, tmp_path / "e", weights="fp16")
    with open_session(device) as session:
        session.load("e", engine.path)
        answer = engine_function(session, "e", engine)
        with torch.no_grad():
            for size in (1, 3, 4):
                torch.testing.assert_close(answer(x[0][:size]), model(x[0][:size]), rtol=2e-2, atol=2e-3)
    found = quality_of(engine, device, synthetic(x[0].shape, count=6), model)
    assert set(found) == {"dense", "pruned", "engine"}, "stored in half precision: its own answers count"
    assert found["pruned"].relative_error == 0 and 0 < (found["engine"].relative_error or 0) < 1e-2


def test_verify_judges_a_bundle_on_data_and_ends_with_7(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeprune.bundle import Contents, write_bundle

    model = plain().eval()
    device = ep.load_device("host-onnxruntime")
    dense = export(as_pruned(model, X), device, tmp_path / "dense")
    write_bundle(tmp_path / "bundle", Contents(engine=dense, dense=dense))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32))
    quick = ["--warmup-ms", "1", "--duration-s", "1", "--min-iters", "4"]
    given = ["verify", str(tmp_path / "bundle"), "--data", str(tmp_path / "data.npz"), *quick]
    assert main([*given, "--min-quality", "relative_error:0"]) in (0, 6)
    assert main([*given, "--min-quality", "kl:0", "--min-quality", "top1:0.5"]) == 2
    assert "needs labels" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "bundle"), "--min-quality", "0.5"]) == 2
    assert "needs data to judge by" in capsys.readouterr().err


def test_a_ratio_may_be_to_the_dense_engine_in_another_precision(tmp_path: Path) -> None:
    """The formula takes as long in each; what counts is which engines are measured and kept."""
    from edgeprune.device import Device, in_precision

    device = in_precision(Device(name="null8", backend="null", precisions=("fp32", "int8")), "int8")
    task = Task(model=plain().eval(), name="plain", example_inputs=X, device=device, saliency="l2", relative_to="fp32")
    found = fit(task, parse_budget("0.6x"), tmp_path / "bundle")
    assert found.verification.met and found.verification.pruned.ratio is not None
    assert 0.5 < found.verification.pruned.ratio.value <= 0.6
    assert found.bundle.dense is not None
    assert (found.bundle.engine.precision, found.bundle.dense.precision) == ("int8", "fp32")
    with pytest.raises(InputError, match="--relative-to says what a ratio is taken to, 8 ms is none"):
        fit(task, parse_budget("8ms"), tmp_path / "other")
