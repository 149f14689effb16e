"""One model of the zoo through its gates, in a process of its own, and the row that tells what happened.

1. The pruned eager model runs. 2. Its output is exact in float64, and the negative control is not. 3. Its ONNX file
runs in onnxruntime with the same output. Three random plans prune every group by about a third and drop some blocks;
the ONNX gate takes the first.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.weights import Inputs, float64, outputs_of, redraw_all, why_void
from benchmarks.coverage.zoo import build
from benchmarks.coverage.zoo import entries as zoo_entries
from benchmarks.coverage.zoo_traps import MUST_REFUSE
from edgeprune import apply
from edgeprune.errors import EdgepruneError, RefusedError
from edgeprune.graph import ModelGraph, trace
from tests.reference import difference, masked_outputs, random_plan, shift_one

PLANS = int(os.environ.get("COVERAGE_PLANS", "3"))
LIMIT = 1e-9
LEAST_CONTROL = 1e-6
ONNX_LIMIT = 1e-3
FEW_PLANS, NO_PLANS = 30_000_000, 450_000_000
"""Parameters above which float64 takes the first plan only, or is left out (the largest variants of a family)."""
SHIFTS = 6
Row = dict[str, Any]
Save = Callable[[Row], None]


def run_gates(name: str, gates: str, save: Save) -> None:
    """Fill the row of one model, saving it after every stage, so that a kill loses one stage only."""
    row: Row = {"model": name, "status": "error", "stage": "build", "gates": {}, "seconds": {}, "notes": []}
    save(row)
    try:
        with quiet():
            _gates(row, name, gates, save)
    except RefusedError as error:
        status = "passed" if name in MUST_REFUSE else "refused"
        row.update(status=status, reasons=[str(error).split("\n")[0], *error.reasons[:4]])
    except Exception as error:  # whatever a model, torch or onnxruntime raises is a row
        row.update(
            status="failed", error=f"{row['stage']}: {first_line(error)}", traceback=traceback.format_exc()[-1500:]
        )
    if row["stage"] == "end":
        row["status"] = "passed" if all(row["gates"].values()) and name not in MUST_REFUSE else "failed"
    save(row)


def _gates(row: Row, name: str, gates: str, save: Save) -> None:
    def stage(stage_name: str) -> None:
        row["stage"] = stage_name
        save(row)

    model, inputs = build(name)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    stage("redraw")
    redraw_all(model.eval(), inputs, 0)
    if reason := why_void(model, inputs):
        row.update(status="void", error=reason)
        return
    pruned, groups = prune(row, model, inputs, stage)
    with torch.no_grad():
        outputs = outputs_of(pruned(*inputs))
    row["gates"]["1"] = all(bool(y.isfinite().all()) for y in outputs)
    if "2" in gates:
        stage("exactness")
        exactness(row, model, inputs, groups)
    if "3" in gates:
        stage("onnx")
        del model
        onnx_gate(row, pruned, inputs, outputs)
    stage("end")


def prune(
    row: Row, model: torch.nn.Module, inputs: Inputs, stage: Callable[[str], None]
) -> tuple[torch.nn.Module, list[str]]:
    """Export alone, trace and apply, timed in float32: the module under the first plan, the ids of the groups."""
    warm_up()
    stage("export")
    timed(row, "export", lambda: export(model, inputs))
    stage("trace")
    graph = timed(row, "trace", lambda: trace(model, inputs))
    row.update(described(graph))
    stage("apply")
    plan = random_plan(graph, 0)
    pruned: torch.nn.Module = timed(row, "apply", lambda: apply(plan, model, inputs, graph=graph)).module
    return pruned, [group.id for group in graph.groups]


def described(graph: ModelGraph) -> Row:
    """What the table says about the analysis."""
    return {
        "tracer": graph.program.tracer,
        "groups": len(graph.groups),
        "blocks": len(graph.blocks),
        "refusals": len(graph.refused),
        "reasons": [f"{r.operator} at {r.where or 'model'}: {r.reason}" for r in graph.refused[:5]],
        "macs_share": round(graph.prunable_macs_share, 4),
        "params_share": round(graph.prunable_params_share, 4),
    }


def exactness(row: Row, model: torch.nn.Module, inputs: Inputs, groups: list[str]) -> None:
    """Gate 2 (and gate 1 on every plan): the pruned model against the masked program, and one kept index shifted.

    `model` is float64 afterwards.
    """
    started = time.perf_counter()
    if row["parameters"] > NO_PLANS:
        row["notes"].append("too large for float64")
        return
    number = 1 if row["parameters"] > FEW_PLANS else PLANS
    if number < PLANS:
        row["notes"].append("float64 on the first plan only")
    with torch.no_grad():
        single = outputs_of(model(*inputs))
    model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    errors: list[float] = []
    controls: list[float] = []
    row.update(errors=errors, controls=controls)
    with float64(), torch.no_grad():
        row["float32_error"] = largest([y.double() for y in single], outputs_of(model(*inputs)))
        if row["float32_error"] > ONNX_LIMIT / 10:
            row["notes"].append(f"ill-conditioned: float32 is off by {row['float32_error']:.0e}")
        graph = trace(model, inputs)
        if groups != [group.id for group in graph.groups]:
            row["notes"].append("float64 gives other groups than float32")
        for seed in range(number):
            plan = random_plan(graph, seed)
            row["dropped"] = row.get("dropped", 0) + len(plan.dropped)
            expected = outputs_of(masked_outputs(graph, plan, model, inputs))
            errors.append(largest(outputs_of(apply(plan, model, inputs, graph=graph).module(*inputs)), expected))
            control: float | None = 0.0
            for which in range(SHIFTS):  # a channel that a ReLU silences changes nothing
                try:
                    shifted = shift_one(plan, graph, which)
                except (ValueError, IndexError, ZeroDivisionError):  # the dropped blocks hide every group
                    row["notes"].append(f"plan {seed} has no negative control")
                    control = None
                    break
                module = apply(shifted, model, inputs, graph=graph).module
                control = largest(outputs_of(module(*inputs)), expected)
                if control > LEAST_CONTROL:
                    break
            else:
                row["notes"].append(f"plan {seed}: {SHIFTS} shifts changed nothing")
            if control is not None:
                controls.append(control)
    row["seconds"]["exactness"] = round(time.perf_counter() - started, 3)
    row["gates"]["2"] = max(errors) <= LIMIT and bool(controls) and min(controls) > LEAST_CONTROL


def largest(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative difference over all outputs; infinite where one is not finite or of another shape."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return float("inf")
    differences = [difference(a, b) for a, b in zip(outputs, expected, strict=True) if float(b.abs().max()) > 0]
    worst = max(differences, default=float("inf"))
    return float("inf") if any(d != d for d in differences) else worst


def onnx_gate(row: Row, pruned: torch.nn.Module, inputs: Inputs, outputs: list[torch.Tensor]) -> None:
    """Gate 3, by torch's exporter, by the older one (TorchScript) where that fails."""
    started = time.perf_counter()
    failures = []
    for exporter in ("dynamo", "torchscript"):
        try:
            error = onnx_difference(pruned, inputs, outputs, exporter)
        except Exception as failure:  # any type, from either exporter or the runtime
            failures.append(f"{exporter}: {first_line(failure)}")
            continue
        row.update(exporter=exporter, onnx_error=error)
        if error <= ONNX_LIMIT:
            break
        failures.append(f"{exporter}: off by {error:.1e}")
    row["gates"]["3"] = row.get("onnx_error", float("inf")) <= ONNX_LIMIT
    row["seconds"]["onnx"] = round(time.perf_counter() - started, 3)
    row["notes"] += failures


def onnx_difference(pruned: torch.nn.Module, inputs: Inputs, outputs: list[torch.Tensor], exporter: str) -> float:
    """Export, run, compare with the eager outputs."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "model.onnx")
        copied = copy.deepcopy(pruned)
        if exporter == "dynamo":
            torch.onnx.export(copied, inputs, path, dynamo=True, external_data=True, optimize=True, verbose=False)
        else:
            torch.onnx.export(copied, inputs, path, dynamo=False, opset_version=18)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        answers = [torch.from_numpy(y) for y in session.run(None, feeds)]
    return largest([y for y in answers if y.is_floating_point()], outputs)


def export(model: torch.nn.Module, inputs: Inputs) -> None:
    """What `torch.export` alone takes; a failure is noted by the row's missing time."""
    with torch.no_grad():
        torch.export.export(model, inputs, strict=False)


def warm_up() -> None:
    """First calls import much of torch; they belong to no model."""
    small, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval(), (torch.randn(2, 4),)
    export(small, x)
    graph = trace(small, x)
    apply(random_plan(graph, 0), small, x, graph=graph)


def preload(names: list[str]) -> None:
    """Import what the models of these names and the gates need, so that a fork need not."""
    import onnxruntime  # noqa: F401

    for prefix in {name.partition(":")[0] for name in names}:
        zoo_entries(prefix)
    with quiet():
        warm_up()
        small = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
        torch.onnx.export(small, (torch.randn(2, 4),), dynamo=True, verbose=False)


def timed(row: Row, name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; its seconds go into the row. A failing export is a note: trace says whether it matters."""
    started = time.perf_counter()
    try:
        answer = work()
    except Exception as error:
        if name != "export" or isinstance(error, EdgepruneError):
            raise
        row["notes"].append(f"torch.export: {first_line(error)}")
        return None
    row["seconds"][name] = round(time.perf_counter() - started, 3)
    return answer


def first_line(error: BaseException) -> str:
    """`TypeError: what it said`, one line."""
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, nothing printed by exporters."""
    import logging

    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def portable(text: str) -> str:
    """Without the folders of this machine: paths from the package or the repository on."""
    text = re.sub(r"[^\s\"'(]*/site-packages/", "", text)
    return text.replace(str(Path(__file__).resolve().parents[2]) + "/", "")


def in_child(module: str, arguments: list[str], seconds: float) -> Row:
    """The row that a child process saved last; a kill or a crash is told by its status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-m", module, *arguments, "--child", str(path)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        ended = ""
        try:
            _, errors = child.communicate(timeout=seconds)
            if child.returncode != 0:
                ended = f"exit code {child.returncode}: {errors.strip()[-300:]}"
        except subprocess.TimeoutExpired:
            ended = f"timed out after {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        row: Row = json.loads(path.read_text("utf-8")) if path.is_file() else {"notes": [], "gates": {}, "seconds": {}}
        if ended:
            status = "timed out" if ended.startswith("timed out") else "crashed"
            row.update(status=status, error=f"{row.get('stage', 'start')}: {ended}")
        row["wall_seconds"] = round(time.perf_counter() - started, 1)
        return row


def in_fork(work: Callable[[Save], None], seconds: float) -> Row:
    """The row that a fork of this process saved last: what is imported here costs no model anything."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                work(saver(path))
            os._exit(0)
        ended = _wait(child, seconds)
        row: Row = json.loads(path.read_text("utf-8")) if path.is_file() else {"notes": [], "gates": {}, "seconds": {}}
        if ended:
            status = "timed out" if ended.startswith("timed out") else "crashed"
            row.update(status=status, error=f"{row.get('stage', 'start')}: {ended}")
        row["wall_seconds"] = round(time.perf_counter() - started, 1)
        return row


def _wait(child: int, seconds: float) -> str:
    """How a child ended before its time; "" where it did not."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "" if status == 0 else f"ended by signal {os.waitstatus_to_exitcode(status)}"
            time.sleep(0.05)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"timed out after {seconds:g} s"


def saver(path: Path) -> Save:
    """Writes a row to that file, whole or not at all."""

    def save(row: Row) -> None:
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(row), encoding="utf-8")
        temporary.replace(path)

    return save
