"""The stages of `python -m benchmarks.formats`; each adds rows to `<stage>.jsonl` in the work folder."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import edgeprune as ep
from benchmarks.formats.networks import NETWORKS, Subject
from edgeprune import parity
from edgeprune.budget import parse_budget
from edgeprune.device import Device, in_precision
from edgeprune.engine import Engine
from edgeprune.errors import EdgepruneError, QualityError
from edgeprune.executed import executed
from edgeprune.exporting import as_pruned, export
from edgeprune.gating import engine_outputs
from edgeprune.measurement import TensorSpec
from edgeprune.modelled import backend_of
from edgeprune.plan_json import Plan
from edgeprune.preparing import Task, prepare, prune
from edgeprune.pruned import Pruned
from edgeprune.quality import Outputs, compare, outputs
from edgeprune.ranges import batches_of
from edgeprune.recovery import repair
from edgeprune.surgery import apply
from edgeprune.transport import open_session
from edgeprune.verifying import measure_pair
from edgeprune.weights import load_weights

Row = dict[str, Any]
BUDGET = "0.7x"
CALIBRATED = 256
SMALL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all stages share."""

    data: Path
    shared: Path
    work: Path
    devices: tuple[str, ...]
    plan_for: str
    precisions: frozenset[str] = frozenset()
    most: int | None = None
    subjects: dict[str, Subject] = field(default_factory=dict)
    dense: dict[str, Outputs] = field(default_factory=dict)

    def subject(self, name: str) -> Subject:
        if name not in self.subjects:
            self.subjects[name] = NETWORKS[name](self.data, self.shared)
        return self.subjects[name]

    def rows(self, stage: str) -> list[Row]:
        path = self.work / f"{stage}.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def add(self, stage: str, row: Row) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / f"{stage}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(stage, json.dumps(row), flush=True)

    def lacks(self, stage: str, **key: str) -> bool:
        return not any(key.items() <= row.items() for row in self.rows(stage))

    @cached_property
    def usable(self) -> dict[str, Device]:
        """The devices whose runtime is here; what is missing for the others is told."""
        found = {}
        for name in self.devices:
            device = ep.load_device(name)
            missing = backend_of(device).available()
            if missing is None:
                found[name] = device
            else:
                print(f"{name} left out: {missing}", flush=True)
        return found

    def formats(self, device: Device) -> Iterator[tuple[str, str]]:
        """(precision of the arithmetic, how weights are stored)."""
        wanted = self.precisions or {*device.precisions}
        for precision in device.precisions:
            if precision in wanted:
                yield precision, "fp32"
        if "fp32" not in wanted:
            return
        stored = importlib.import_module(f"edgeprune.backends.{device.backend}.exporting")
        known: Any = getattr(stored, "WEIGHTS", ("fp32",))
        for weights in known["fp32"] if isinstance(known, dict) else known:
            if weights not in ("fp32", "sparse"):  # zeros are another matter: benchmarks.unstructured
                yield "fp32", weights

    def pruned(self, name: str) -> Pruned:
        """As the stage `prune` left it."""
        subject = self.subject(name)
        found = apply(Plan.from_json(self.work / name / "plan.json"), subject.model, subject.example)
        load_weights(found.module, self.work / name / "weights.safetensors")
        return found

    def engine(self, name: str, device: Device, precision: str, weights: str, kind: str, given: Pruned) -> Engine:
        """Exported before: its files, with what it takes and gives."""
        folder = self.work / name / device.name / f"{precision}-{weights}" / kind
        note = json.loads((folder.parent / f"{kind}.json").read_text("utf-8"))
        return Engine(
            backend=note["backend"],
            precision=precision,
            path=folder / note["path"],
            files=tuple(folder / file for file in note["files"]),
            onnx=None,
            inputs=tuple(TensorSpec(**spec) for spec in note["inputs"]),
            outputs=tuple(TensorSpec(**spec) for spec in note["outputs"]),
            notes=note["notes"],
            device=device,
            pruned=given,
        )


def prune_one(bench: Bench, name: str) -> None:
    """Plan by prediction, apply, repair, keep plan and weights."""
    if not bench.lacks("prune", network=name):
        return
    started = time.perf_counter()
    subject = bench.subject(name)
    task = Task(
        model=subject.model,
        name=name,
        example_inputs=subject.example,
        device=ep.load_device(bench.plan_for),
        data=subject.fitted,
        saliency="l2" if subject.fitted.is_synthetic else "taylor_output",
    )
    prepared = prepare(task)
    plan, choice = prune(task, prepared, parse_budget(BUDGET))
    cut = apply(plan, subject.model, subject.example, graph=prepared.graph)
    pruned, told = repair(cut, subject.fitted, dense=subject.model, graph=prepared.graph)
    folder = bench.work / name
    folder.mkdir(parents=True, exist_ok=True)
    plan.to_json(folder / "plan.json")
    _save(pruned.module, folder / "weights.safetensors")
    ratio = choice.predicted_us / prepared.cost.predict({}).us
    seconds = round(time.perf_counter() - started, 1)
    bench.add(
        "prune",
        {
            "network": name,
            "what": subject.what,
            "plan_for": bench.plan_for,
            "predicted": round(ratio, 4),
            "origin": prepared.cost.basis,
            "repair": told.chosen,
            "seconds": seconds,
        },
    )


def _save(module: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save({name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}))


def export_one(bench: Bench, name: str) -> None:
    """Engines of both networks in every format, their size, and the parity of the pruned one."""
    subject = bench.subject(name)
    calibration = batches_of(subject.fitted, subject.example, most=CALIBRATED)
    networks: dict[str, Pruned] = {}
    for device in bench.usable.values():
        for precision, weights in bench.formats(device):
            key = {"network": name, "device": device.name, "precision": precision, "weights": weights}
            if not bench.lacks("export", **key):
                continue
            networks = networks or {
                "dense": as_pruned(subject.model, subject.example),
                "pruned": bench.pruned(name),
            }
            try:
                row = _exported(bench, key, device, networks, calibration)
            except EdgepruneError as error:
                row = {"error": str(error)}
            bench.add("export", {**key, **row})


def _exported(bench: Bench, key: Row, device: Device, networks: dict[str, Pruned], calibration: Any) -> Row:
    found: Row = {}
    folder = bench.work / key["network"] / device.name / f"{key['precision']}-{key['weights']}"
    started = time.perf_counter()
    for kind, given in networks.items():
        engine = export(
            given,
            device,
            folder / kind,
            precision=key["precision"],
            weights=key["weights"],
            calibration=calibration if key["precision"] == "int8" else (),
        )
        note = {
            "backend": engine.backend,
            "path": engine.path.name,
            "files": [file.name for file in engine.files],
            "inputs": [vars(spec) for spec in engine.inputs],
            "outputs": [vars(spec) for spec in engine.outputs],
            "notes": dict(engine.notes),
        }
        (folder / f"{kind}.json").write_text(json.dumps(note), encoding="utf-8")
        beside = engine.path.with_suffix(".bin")  # of OpenVINO's format; its ONNX isn't what is deployed
        found[f"{kind}_bytes"] = engine.path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    return {**found, **_parity(engine, device), "seconds": round(time.perf_counter() - started, 1)}


def _parity(engine: Engine, device: Device) -> Row:
    assert engine.pruned is not None
    expected = parity.samples(engine.pruned, calibration=engine.calibration)
    with open_session(device, precision=engine.precision) as session:
        session.load("engine", engine.path)
        errors = [
            max(parity.output_errors(engine, session.run("engine", parity.fed(engine, sample)), sample).values())
            for sample in expected
        ]
        try:
            parity.check_parity(session, "engine", engine, expected)
        except QualityError as error:
            return {"parity": max(errors), "parity_fault": str(error)}
    return {"parity": max(errors)}


def judge_one(bench: Bench, name: str) -> None:
    """The dense and the pruned torch module, then every pruned engine, on data that nothing was fitted to."""
    subject = bench.subject(name)
    judged = subject.judged
    if bench.most is not None:
        first = set(judged.order[: bench.most])
        judged = judged.select([i in first for i in range(len(judged))])
    pruned = bench.pruned(name)
    for kind, module in (("dense", subject.model), ("pruned", pruned.module)):
        key = {"network": name, "device": "torch", "precision": "fp32", "weights": kind}
        if bench.lacks("judge", **key):
            bench.add("judge", {**key, **compare(outputs(module, judged), _dense(bench, name, judged)).to_json()})
    for device in bench.usable.values():
        for precision, weights in bench.formats(device):
            key = {"network": name, "device": device.name, "precision": precision, "weights": weights}
            if bench.lacks("judge", **key) and _is_exported(bench, key):
                engine = bench.engine(name, device, precision, weights, "pruned", pruned)
                started = time.perf_counter()
                found = compare(engine_outputs(engine, device, judged), _dense(bench, name, judged)).to_json()
                bench.add("judge", {**key, **found, "seconds": round(time.perf_counter() - started, 1)})


def _dense(bench: Bench, name: str, judged: Any) -> Outputs:
    if name not in bench.dense:
        bench.dense[name] = outputs(bench.subject(name).model, judged)
    return bench.dense[name]


def _is_exported(bench: Bench, key: Row) -> bool:
    return any(key.items() <= row.items() and "error" not in row for row in bench.rows("export"))


def time_one(bench: Bench, name: str) -> None:
    """Pruned beside dense of the same form; weights stored otherwise are widened when they are loaded."""
    pruned = bench.pruned(name)
    for device in bench.usable.values():
        for precision, weights in bench.formats(device):
            key = {"network": name, "device": device.name, "precision": precision, "weights": weights}
            if not bench.lacks("time", **key) or not _is_exported(bench, key):
                continue
            cut, dense = (bench.engine(name, device, precision, weights, kind, pruned) for kind in ("pruned", "dense"))
            try:
                found = measure_pair(cut, dense, device=in_precision(device, precision))
                ran = executed(cut, device)
            except EdgepruneError as error:
                print(f"{key}: {error}; not timed, try again", flush=True)
                continue
            assert found.dense is not None and found.pruned.ratio is not None
            bench.add(
                "time",
                {
                    **key,
                    "dense_ms": found.dense.p50_ms,
                    "pruned_ms": found.pruned.p50_ms,
                    "ratio": found.pruned.ratio.value,
                    "ratio_upper": found.pruned.ratio.upper,
                    "n": found.pruned.n,
                    "disturbed": found.disturbed_rounds,
                    "ran_in": dict(ran.shares) if ran else None,
                },
            )


STAGES: dict[str, Callable[[Bench, str], None]] = {
    "prune": prune_one,
    "export": export_one,
    "judge": judge_one,
    "time": time_one,
}
