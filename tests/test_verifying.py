from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune import robust
from edgeprune.budget import parse_budget
from edgeprune.device import Device, load_device
from edgeprune.engine import Engine
from edgeprune.errors import QualityError, UnstableError
from edgeprune.exporting import as_pruned, export, export_dense
from edgeprune.latency import Latency, latency_of, undisturbed_or_raise
from edgeprune.measurement import Measurement, Timing, joined
from edgeprune.parity import output_errors, samples
from edgeprune.transport import Session
from edgeprune.verifying import (
    Verification,
    decide,
    load_orders,
    on_todays_clock,
    verify,
)
from tests.small_models import Net, patiently, pruned, redrawn

QUICK = Timing(warmup_ms=5, burst_ms=1, min_rounds=60, max_rounds=60, max_seconds=10)
Require = Callable[[str], None]


def estimate(value: float, upper: float) -> robust.Estimate:
    return robust.Estimate(value=value, low=2 * value - upper, high=upper, upper=upper, n=100, rounds=30)


def result(pruned_ms: float, upper_ms: float, ratio: tuple[float, float] | None = (0.7, 0.71)) -> Verification:
    dense = Latency(p50_ms=10.0, p90_ms=11.0, n=100, at=estimate(10.0, 10.1))
    small = Latency(
        p50_ms=pruned_ms,
        p90_ms=pruned_ms,
        n=100,
        at=estimate(pruned_ms, upper_ms),
        ratio=estimate(*ratio) if ratio else None,
    )
    return Verification(device="d", origin="measured", dense=dense, pruned=small, rounds=30)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("budget", "upper_ms", "ratio", "met"),
    [
        ("8ms", 7.9, (0.7, 0.71), True),
        ("8ms", 8.1, (0.7, 0.71), False),  # the estimate of 7.8 ms alone is inside
        ("125fps", 7.9, (0.7, 0.71), True),
        ("0.72x", 9.9, (0.7, 0.71), True),
        ("0.705x", 7.9, (0.7, 0.71), False),
        ("8ms", 7.9, (0.99, 1.01), False),  # perhaps slower than dense
    ],
)
def test_met_means_the_bound_is_inside(budget: str, upper_ms: float, ratio: tuple[float, float], met: bool) -> None:
    decided = decide(result(7.8, upper_ms, ratio), parse_budget(budget))
    assert decided.met is met
    assert decided.budget is not None and parse_budget(decided.budget) == parse_budget(budget)
    assert decided.why


@pytest.mark.unit
def test_batches_ties_and_no_budget() -> None:
    assert decide(result(7.8, 7.9), parse_budget("250fps"), batch=2).budget_ms == 8
    assert decide(result(7.8, 7.9), parse_budget("0.8x")).budget_ms == pytest.approx(8)
    tie = result(10.0, 10.1, (1.0, 1.004))
    assert decide(tie, parse_budget("11ms"), same=True).met
    assert decide(tie, parse_budget("1x"), same=True).met
    assert not decide(tie, parse_budget("11ms")).met
    assert decide(tie, None).met is None
    with pytest.raises(ValueError, match="dense"):
        decide(replace(result(1, 1, None), dense=None), parse_budget("0.5x"))


@pytest.mark.unit
def test_too_noisy_to_say_is_its_own_error() -> None:
    with pytest.raises(UnstableError, match="too noisy"):
        decide(result(7.8, 9.0), parse_budget("8ms"))
    assert decide(result(8.2, 9.9), parse_budget("8ms")).met is False  # a miss needs no certainty
    with pytest.raises(UnstableError, match="too noisy"):
        decide(result(7.8, float("inf")), parse_budget("8ms"))


def measurement(dense: list[list[float]], small: list[list[float]], reference: list[list[float]]) -> Measurement:
    times = {"dense": dense, "pruned": small, "ref": reference}
    return Measurement(
        times_us=times, rounds={key: list(range(len(v))) for key, v in times.items()}, references=("ref",)
    )


@pytest.mark.unit
def test_latencies_leave_out_rounds_that_the_references_disown() -> None:
    rng = np.random.default_rng(0)
    dense, small, reference = (
        (scale * (1 + 0.01 * rng.standard_normal((40, 4)))).tolist() for scale in (1000.0, 700.0, 50.0)
    )
    for number in (3, 17):
        for series in (dense, small, reference):
            series[number] = [3 * v for v in series[number]]
    found = measurement(dense, small, reference)
    bad = undisturbed_or_raise(found)
    assert bad == {3, 17}
    seen = latency_of(found, "pruned", "dense", without=bad)
    assert seen.n == 38 * 4
    assert seen.ratio is not None and seen.ratio.value == pytest.approx(0.7, rel=0.01)
    assert seen.p90_ms < 0.75
    tail = latency_of(found, "pruned", "dense", percentile=90, without=bad)
    assert tail.at.value == pytest.approx(seen.p90_ms, rel=0.01)
    assert tail.ratio is not None and tail.ratio.value == pytest.approx(0.7, rel=0.02)
    slow = [[v * (1 + 2 * (i % 2)) for v in burst] for i, burst in enumerate(reference)]
    with pytest.raises(UnstableError, match="busy"):
        undisturbed_or_raise(measurement(dense, small, slow[:20] + [[9.0]] * 20))


def later_is_faster(rounds: int, noise: float = 0.0) -> Measurement:
    """Two processes: in the first dense is loaded first, in the second pruned; the later one runs 2 % faster."""
    rng = np.random.default_rng(0)

    def bursts(us: float) -> list[list[float]]:
        return (us * (1 + noise * rng.standard_normal((rounds, 4)))).tolist()  # type: ignore[no-any-return]

    first = measurement(bursts(1000.0), bursts(0.98 * 700.0), bursts(50.0))
    second = measurement(bursts(0.98 * 1000.0), bursts(700.0), bursts(50.0))
    return joined([first, second])


@pytest.mark.unit
def test_what_the_order_of_loading_does_cancels_in_the_ratio() -> None:
    found = later_is_faster(20)
    assert found.processes == (0, 20)
    seen = latency_of(found, "pruned", "dense").ratio
    assert seen is not None and seen.value == pytest.approx(0.7) and seen.upper == pytest.approx(0.7)
    one_way = latency_of(replace(found, processes=(0,)), "pruned", "dense").ratio
    assert one_way is not None and one_way.upper > 0.714  # as if it were drift from round to round
    for percentile in (50.0, 90.0):
        noisy = latency_of(later_is_faster(20, noise=0.005), "pruned", "dense", percentile=percentile).ratio
        assert noisy is not None and noisy.value == pytest.approx(0.7, rel=0.005)
        assert noisy.value < noisy.upper < 1.01 * noisy.value


@pytest.mark.unit
def test_rounds_of_two_processes_stand_side_by_side() -> None:
    found = replace(later_is_faster(3), processes=(0, 3))
    assert found.by_process([5, 0, 3, 1]) == [[0, 1], [3, 5]]
    assert found.side_by_side([5, 0, 3, 1, 2]) == [(0, 3), (1, 5)]
    slower = {key: [[2 * us for us in burst] for burst in bursts] for key, bursts in found.times_us.items()}
    both = joined([replace(found, processes=(0,)), replace(found, processes=(0,), times_us=slower)])
    assert both.disturbed() == frozenset()  # each process has a median of its own


@pytest.mark.unit
def test_a_process_of_which_nothing_is_left_is_too_noisy() -> None:
    """Half of all rounds may be disturbed, but not every round of one of the two processes."""
    quiet = measurement([[1000.0]] * 4, [[700.0]] * 4, [[50.0]] * 4)
    busy = measurement([[1000.0]] * 4, [[700.0]] * 4, [[50.0], [100.0], [50.0], [100.0]])
    found = joined([quiet, busy])
    assert found.disturbed() == {4, 5, 6, 7}
    with pytest.raises(UnstableError, match="in 4 of 8 rounds"):
        undisturbed_or_raise(found)
    assert undisturbed_or_raise(joined([quiet, quiet])) == frozenset()


@pytest.mark.unit
def test_two_processes_only_where_engines_share_one_and_a_clock_is_asked() -> None:
    clocked = {"modelled": False, "own_bursts": False}
    assert load_orders(("dense", "pruned"), clocked) == (("dense", "pruned"), ("pruned", "dense"))
    assert load_orders(("pruned",), clocked) == (("pruned",),)
    for hello in ({"modelled": True, "own_bursts": False}, {"modelled": False, "own_bursts": True}):
        assert load_orders(("dense", "pruned"), hello) == (("dense", "pruned"),)


@pytest.mark.unit
def test_two_processes_share_the_time_of_one() -> None:
    half = Timing(min_rounds=15, max_rounds=60, max_seconds=30.0, tolerance=0.01).shared_by(2)
    assert (half.min_rounds, half.max_rounds, half.max_seconds) == (8, 30, 15.0)
    assert half.tolerance == pytest.approx(0.01 * 2**0.5)


@pytest.mark.integration
@pytest.mark.timed
def test_engines_are_loaded_in_both_orders_and_the_result_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The null device's program, said to tell times by a clock."""
    real_hello, real_load, loads = Session.hello, Session.load, list[str]()

    def load(self: Session, key: str, *arguments: Any, **options: Any) -> Any:
        loads.append(key)
        return real_load(self, key, *arguments, **options)

    monkeypatch.setattr(Session, "hello", lambda self: {**real_hello(self), "modelled": False})
    monkeypatch.setattr(Session, "load", load)
    engine = export(pruned(redrawn(Net(8))), load_device("null"), tmp_path / "engine")
    dense = export_dense(redrawn(Net(64)), engine.pruned.example_inputs, load_device("null"), tmp_path / "dense")  # type: ignore[union-attr]
    found = verify(engine, dense=dense, timing=replace(QUICK, burst_ms=0, min_rounds=9, max_rounds=9))
    assert [key for key in loads if key in ("dense", "pruned")] == ["dense", "pruned", "pruned", "dense"]
    assert found.to_json()["loaded"] == [["dense", "pruned"], ["pruned", "dense"]]
    assert (found.rounds, found.pruned.n) == (10, 40)  # 5 in each process, of 4 runs


@pytest.mark.unit
def test_predictions_move_with_the_references() -> None:
    assert on_todays_clock(100, {"a": 10, "b": 10}, {"a": 20, "b": 5}) == pytest.approx(100)
    assert on_todays_clock(100, {"a": 10}, {"a": 11, "c": 3}) == pytest.approx(110)
    assert on_todays_clock(100, {}, {"a": 11}) == 100


KEYS = {
    *("model", "device", "percentile", "budget_ms", "met", "origin", "predicted_ms", "dense", "pruned", "attempts"),
    *("quality", "bundle", "seconds"),
}


@pytest.mark.integration
@pytest.mark.timed
def test_a_modelled_device_says_so(tmp_path: Path) -> None:
    device = load_device("null")
    engine = export(pruned(redrawn(Net(8))), device, tmp_path / "engine")
    found = patiently(lambda: verify(engine, dense=redrawn(Net(64)), budget="0.95x", timing=QUICK))
    assert (found.met, found.origin, found.parity) == (True, "modelled", None)
    document: dict[str, Any] = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document.keys() >= KEYS
    assert document["dense"].keys() >= {"p50_ms", "p90_ms", "n"}
    assert document["pruned"].keys() >= {"p50_ms", "p90_ms", "n", "ratio", "ratio_ci"}
    assert patiently(lambda: verify(engine, dense=redrawn(Net(64)), budget="0.01x", timing=QUICK)).met is False


@pytest.mark.integration
@pytest.mark.timed
@pytest.mark.parametrize("name", ["host-openvino", "host-onnxruntime"])
def test_a_real_runtime_is_measured_and_compared_with_torch(name: str, require: Require, tmp_path: Path) -> None:
    device = load_device(name)
    require(device.backend)
    engine = export(pruned(redrawn(Net(8))), device, tmp_path / "engine")
    dense = export_dense(redrawn(Net(96)), engine.pruned.example_inputs, device, tmp_path / "dense")  # type: ignore[union-attr]
    found = patiently(lambda: verify(engine, dense=dense, pictures=[torch.rand(1, 3, 16, 16)], timing=QUICK))
    assert found.parity is not None and found.parity.samples == 3 and found.parity.error < 1e-4
    assert (found.origin, found.met) == ("measured", None)
    assert found.pruned.ratio is not None and 0 < found.pruned.ratio.value < 1
    assert found.fingerprint["backend"] == device.backend
    assert found.references_us.keys() == {"compute", "memory"}
    assert found.loaded == (("dense", "pruned"), ("pruned", "dense"))


@pytest.mark.integration
@pytest.mark.timed
def test_an_engine_that_computes_something_else_is_not_handed_over(require: Require, tmp_path: Path) -> None:
    require("openvino")
    device = load_device("host-openvino")
    engine = export(pruned(redrawn(Net(8), seed=1)), device, tmp_path / "engine")
    other = replace(engine, pruned=pruned(redrawn(Net(8), seed=2)))
    with pytest.raises(QualityError, match="output 'output' is off from torch's") as caught:
        verify(other, dense=None, timing=QUICK)
    assert caught.value.exit_code == 7


@pytest.mark.unit
def test_errors_of_outputs(tmp_path: Path) -> None:
    given = pruned(redrawn(Net()))
    engine = export(given, load_device("null"), tmp_path / "engine")
    sample = samples(given)[0]
    (wanted,) = sample.outputs
    assert output_errors(engine, [wanted], sample) == {"output": 0.0}
    assert output_errors(engine, [wanted * np.nan], sample)["output"] == float("inf")
    assert output_errors(engine, [2 * wanted], sample)["output"] == pytest.approx(1)
    with pytest.raises(QualityError, match="shape"):
        output_errors(engine, [wanted[:, :3]], sample)
    with pytest.raises(QualityError, match="2 outputs"):
        output_errors(engine, [wanted, wanted], sample)


@pytest.mark.unit
def test_verify_takes_what_export_gave(tmp_path: Path) -> None:
    engine: Engine = export(pruned(redrawn(Net())), load_device("null"), tmp_path / "engine")
    bare: Device | None = None
    with pytest.raises(ValueError, match="as `export` gives it"):
        verify(replace(engine, device=bare), dense=None)


class Words(torch.nn.Module):
    """Token ids as float32, as data files give them: drawn values are none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.table(ids.long()))


@pytest.mark.unit
def test_a_module_that_takes_no_drawn_values_is_compared_on_its_example_alone() -> None:

    ids = torch.tensor([[0.0, 4.0, 2.0]])
    found = samples(as_pruned(Words(), (ids,)), pictures=(ids + 0,))
    assert [sample.inputs[0].tolist() for sample in found] == [ids.tolist()] * 2
    assert len(samples(as_pruned(torch.nn.Linear(3, 3), (ids,)))) == 2
