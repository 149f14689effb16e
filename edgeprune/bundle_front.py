"""Check, measure and run this bundle where edgeprune is not: Python 3.8 or later, numpy and the engine's runtime.

    python run.py                       hashes of all files, outputs, latency beside the dense engine
    python run.py check                 hashes alone; the standard library is enough
    python run.py run IN.npy --out OUT.npz

    from run import load
    y = load().run(x)

Copied from edgeprune into the bundle when it was written. It is code of the bundle, as its engine is: who doesn't trust
where the bundle comes from checks it with `edgeprune verify`, which runs nothing of it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # no file in the bundle's folder is imported, whatever it is called
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]
    import os  # Python's own: it is there since the start

    _folder = os.path.realpath(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _folder]

import argparse
import importlib.util
import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

from edgeprune.bundle_core import DENSE, Refused, check_bundle
from edgeprune.bundle_engine import (
    InputFault,
    LoadedEngine,
    check_version,
    differences,
    load_options,
    parity_error,
    read_samples,
    runner_module,
    standing_in,
)
from edgeprune.device_core import Program
from edgeprune.device_statistics import digits, median, quantile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNNERS: dict[str, list[str]] = {}  # backend to the lines of its runner; filled in below
EXIT_CODES = {"input": 2, "runtime": 5, "version": 5, "parity": 7}  # any other is 1, as edgeprune's
PRUNED = "pruned"
INSTALL: dict[str, str] = {}  # backend to what installs its runtime; filled in below
ROUNDS = {"min_rounds": 20, "max_rounds": 240, "tolerance": 0.005, "settle_alone": False, "burst_percentile": 50.0}
BURSTS = {"warmup_ms": 200.0, "burst_ms": 10.0, "untimed_runs": 2, "min_runs": 4}


def load(folder: str | None = None, cache: str | None = None) -> LoadedEngine:
    """The pruned engine, after all files of the bundle were found to be those of its manifest.

    `cache` is a folder of your own, where OpenVINO keeps what it compiled: the next load is faster.
    """
    folder = own_folder(folder)
    document = check_bundle(folder)
    engine = document["engine"]
    runner = load_runner(document)
    options = load_options(document["device"], engine["precision"])
    return LoadedEngine(runner, os.path.join(folder, *engine["path"].split("/")), options, engine, cache)


def own_folder(folder: str | None) -> str:
    return os.path.abspath(folder or os.path.dirname(os.path.abspath(__file__)))


def load_runner(document: Mapping[str, Any]) -> Any:
    """The runner of the engine's backend, if its runtime is here and not too old."""
    name = document["engine"]["backend"]
    if name not in RUNNERS:
        raise Refused("run.py runs %s, the manifest names %.80r" % (" and ".join(RUNNERS), name))
    try:
        import numpy  # noqa: F401

        runner = runner_module(name, "\n".join(RUNNERS[name]) + "\n")
        version = runner.version()
    except (ImportError, RuntimeError) as error:
        raise Refused("what runs the engine is not here (%s): %s" % (error, INSTALL[name]), "runtime") from None
    check_version(document["runtime"], version)
    return runner


def verify(folder: str | None = None, seconds: float = 10.0) -> dict[str, Any]:
    """Hashes, outputs against torch's, and latencies of both engines in hot bursts that take turns, in one process."""
    folder = own_folder(folder)
    document = check_bundle(folder)
    program = Program(load_runner(document), "", lambda message: None)
    program.parent = 0  # it goes on when the shell that started it has ended
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch, standing_in(scratch, program.runner):
        return measure(program, folder, document, seconds)


def measure(program: Program, folder: str, document: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What `verify` gives, of a bundle whose files were checked."""
    hello = program.op_hello({})
    engines = {PRUNED: document["engine"], DENSE: document["dense"]}
    engines = {key: entry for key, entry in engines.items() if entry is not None}
    for key, entry in engines.items():
        options = load_options(document["device"], entry["precision"])
        path = os.path.join(folder, *entry["path"].split("/"))
        program.op_load({"key": key, "path": path, "options": options})
    parity = check_parity(program, folder, document) if not hello["modelled"] else None
    anchors = {PRUNED: DENSE} if DENSE in engines else {}
    timing = dict(ROUNDS, max_seconds=seconds, **BURSTS)
    request = {"candidates": list(engines), "references": [], "anchors": anchors, "timing": timing, "seed": 0}
    measured = program.op_measure(request)
    for key in engines:
        program.op_unload({"key": key})
    latency = document["latency"] or {}
    return {
        "model": document["model"]["name"],
        "device": document["device"]["name"],
        "runtime": {"name": document["runtime"]["name"], "version": hello["version"]},
        "precision": document["engine"]["precision"],
        "origin": "modelled" if measured["modelled"] else "measured",
        "files": len(document["files"]),
        "parity": parity,
        **{key: percentiles(measured["times_us"][key]) for key in engines},
        "ratio": ratio(measured, PRUNED, DENSE) if anchors else None,
        "manifest": {key: latency.get(key) for key in ("budget", "met", "origin", "dense", "pruned")},
        "differences": differences(document["fingerprint"], hello),
    }


def check_parity(program: Program, folder: str, document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The largest error over the samples of the bundle; `Refused` above the manifest's tolerance."""
    if "parity.safetensors" not in document["files"]:
        return None
    samples = read_samples(os.path.join(folder, "parity.safetensors"))
    tolerance, worst = float(document["parity"]["tolerance"]), 0.0
    last = document["engine"]["notes"].get("layout") == "channels last"  # samples are as torch took them
    for inputs, expected in samples:
        given = [array.transpose(0, 2, 3, 1) if last and array.ndim == 4 else array for array in inputs]
        worst = max(worst, parity_error(outputs_of(program, document["engine"], given), expected))
    if not worst <= tolerance:
        told = (worst, tolerance, document["engine"]["precision"])
        raise Refused("outputs are off from torch's by %.2g of their largest value, at most %g at %s" % told, "parity")
    return {"error": worst, "tolerance": tolerance, "samples": len(samples)}


def outputs_of(program: Program, engine: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    import numpy as np

    runner, handle = program.runner, program.handles[PRUNED]
    for index, array in enumerate(inputs):
        runner.set_input(handle, index, np.ascontiguousarray(array).tobytes())
    runner.run(handle)
    return [
        np.frombuffer(runner.get_output(handle, index), dtype=spec["dtype"]).reshape(spec["shape"])
        for index, spec in enumerate(engine["outputs"])
    ]


def percentiles(bursts: Sequence[Sequence[float]]) -> dict[str, Any]:
    """In milliseconds, of all runs."""
    runs = [time for burst in bursts for time in burst]
    return {"p50_ms": digits(quantile(runs, 0.5) / 1e3), "p90_ms": digits(quantile(runs, 0.9) / 1e3), "n": len(runs)}


def ratio(measured: Mapping[str, Any], key: str, base: str) -> dict[str, float]:
    """Median over rounds of the ratio of burst medians, and its 95 % interval (normal, by the absolute deviation)."""
    bursts = measured["times_us"]
    values = [median(mine) / median(other) for mine, other in zip(bursts[key], bursts[base])]
    middle = median(values)
    half = 1.96 * 1.2533 * 1.4826 * median([abs(value - middle) for value in values]) / len(values) ** 0.5
    return {"value": digits(middle), "low": digits(middle - half), "high": digits(middle + half)}


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """The table that a person reads."""
    runtime, pruned, dense = result["runtime"], result[PRUNED], result.get(DENSE)
    word = result["origin"] if result["origin"] == "modelled" else ""
    lines = [
        "%s for %s: %s %s, %s"
        % (result["model"] or "a model", result["device"], runtime["name"], runtime["version"], result["precision"])
    ]
    lines.append("  %-12s%d as the manifest has them" % ("files", result["files"]))
    if result["parity"]:
        told = result["parity"]
        lines.append(
            "  %-12s%.1e of at most %g, %d samples" % ("parity", told["error"], told["tolerance"], told["samples"])
        )
    lines.append("  %-12s%-12spruned" % (word, "dense"))
    for title in ("p50", "p90"):
        left = "%.3g ms" % dense[title + "_ms"] if dense else "-"
        row = "  %-12s%-12s%.3g ms" % ("latency " + title, left, pruned[title + "_ms"])
        if title == "p50" and result["ratio"]:
            row += "   %(value).3fx [%(low).3f, %(high).3f]" % result["ratio"]
        lines.append(row)
    lines.append("  %s here, n=%d" % (result["origin"], pruned["n"]))
    then = result["manifest"]
    if then["pruned"]:
        told = [json.dumps(then["pruned"].get(key)) for key in ("p50_ms", "ratio")]
        budget = ", budget %s %s" % (then["budget"], "met" if then["met"] else "not met") if then["budget"] else ""
        lines.append("  then        %s ms, %s of dense (%s)%s" % (told[0], told[1], then["origin"], budget))
    lines += ["  differs     " + difference for difference in result["differences"]]
    if result["differences"]:
        lines.append("              the manifest's latency is that of another machine or version: this one's is above")
    return lines


def run_files(paths: Sequence[str], out: str | None) -> dict[str, Any]:
    """The engine's outputs for inputs in .npy files, in order, or in one .npz by name; written to `out` (.npz)."""
    import numpy as np

    if len(paths) == 1 and paths[0].endswith(".npz"):
        with np.load(paths[0], allow_pickle=False) as file:
            given: Sequence[Any] = [{name: file[name] for name in file.files}]
    else:
        given = [np.load(path, allow_pickle=False) for path in paths]
    with load() as engine:
        found = engine.run(*given)
        names = [spec["name"] for spec in engine.outputs]
    arrays = dict(zip(names, found if isinstance(found, tuple) else (found,)))
    if out:
        target = os.path.abspath(out if out.endswith(".npz") else out + ".npz")
        number, temporary = tempfile.mkstemp(suffix=".npz", dir=os.path.dirname(target))
        with os.fdopen(number, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, target)
    return {
        "outputs": [
            {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "mean": float(array.mean())}
            for name, array in arrays.items()
        ],
        "written": target if out else None,
    }


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description="Check, measure and run this bundle.")
    commands = parser.add_subparsers(dest="command")
    for name, text in (
        ("verify", "hashes, outputs and latency here (what is done without a command)"),
        ("check", "hashes alone"),
        ("run", "outputs for inputs in .npy or .npz files"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if name == "verify":
            command.add_argument("--seconds", type=float, default=10.0, help="to measure, at most [10]")
        if name == "run":
            command.add_argument("inputs", nargs="+", help="one .npy an input in order, or one .npz by name")
            command.add_argument("--out", help=".npz to write")
    given = list(arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "verify")
    return parser.parse_args(given)


def command(arguments: Sequence[str]) -> int:
    """The command line; gives the exit code."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    given = parsed(arguments)
    os.dup2(2, 1)  # what a runtime prints stays out of the answer
    try:
        if given.command == "check":
            count = len(check_bundle(own_folder(None))["files"])
            result: dict[str, Any] = {"files": count}
            lines = ["%d files as the manifest has them" % count]
        elif given.command == "run":
            result = run_files(given.inputs, given.out)
            lines = ["%(name)s: %(dtype)s %(shape)s, mean %(mean).6g" % told for told in result["outputs"]]
        else:
            result = verify(None, given.seconds)
            lines = lines_of(result)
    except Exception as error:  # the runtime's own, of any type
        return _failed(error, given.json, wire)
    wire.write((json.dumps(result, indent=2) if given.json else "\n".join(lines)) + "\n")
    wire.flush()
    return 0


def _failed(error: Exception, as_json: bool, wire: Any) -> int:
    kind = (
        error.kind if isinstance(error, Refused) else "input" if isinstance(error, (InputFault, OSError)) else "failure"
    )
    code = EXIT_CODES.get(kind, 1)
    place = "manifest.json:%s: " % error.place if isinstance(error, Refused) and error.place else ""
    known = isinstance(error, (Refused, InputFault, OSError))
    text = place + str(error) if known else "%s: %s" % (type(error).__name__, str(error).strip() or "no message")
    if as_json:
        wire.write(json.dumps({"error": {"kind": kind, "message": text, "exit_code": code}}) + "\n")
    else:
        sys.stderr.write("error: %s\n" % text.encode("utf-8", "backslashreplace").decode("utf-8"))
    wire.flush()
    return code


def forget_bytecode() -> None:
    """Remove what Python kept of this file when it was imported: the folder holds what the manifest lists, no more."""
    try:
        cached = importlib.util.cache_from_source(os.path.abspath(__file__))
        os.remove(cached)
        os.rmdir(os.path.dirname(cached))
    except (OSError, NotImplementedError):
        pass  # nothing was kept, or somewhere else
