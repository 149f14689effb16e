"""Device half of the modelled devices: standard library only, Python 3.8 or later. Its times are modelled.

A real runtime's model (`model.onnx`) has the times of its kernels beside it, in a file of the same name (`model.json`).

Options: `noise` (relative, of each run; seeded by `seed`), `sleep_ms` (really spent in each run, for tests of time-outs
and kills).
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

NAME = "null"
BYTES = {"float32": 4, "float64": 8, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


class Handle:
    def __init__(self, document: dict[str, Any], options: dict[str, Any]) -> None:
        self.document = document
        self.time_us: float = (
            sum(k["time_us"] for k in document["kernels"]) * document["factor"] + document["offset_us"]
        )
        self.noise = float(options.get("noise", 0.0))
        self.sleep_s = float(options.get("sleep_ms", 0.0)) / 1e3
        self.random = random.Random(repr((options.get("seed", 0), [k["name"] for k in document["kernels"]])))


def version() -> str:
    return "1"  # of the formula, which the host half holds


def load(path: str, options: dict[str, Any]) -> Handle:
    times = os.path.splitext(path)[0] + ".json"
    if not os.path.isfile(times):
        raise ValueError("no modelled times beside %s: it was not exported for a modelled device" % path)
    with open(times) as file:
        document = json.load(file)
    if document.get("schema") != 1:
        raise ValueError("not a model of the null device: %s" % times)
    return Handle(document, options)


def inputs(handle: Handle) -> list[dict[str, Any]]:
    specs: list[dict[str, Any]] = handle.document["inputs"]
    return specs


def outputs(handle: Handle) -> list[dict[str, Any]]:
    specs: list[dict[str, Any]] = handle.document["outputs"]
    return specs


def fill(handle: Handle, seed: int) -> None:
    pass  # its time does not depend on values


def set_input(handle: Handle, index: int, data: bytes) -> None:
    spec = inputs(handle)[index]
    if len(data) != _num_bytes(spec):
        raise ValueError("input %s takes %d bytes, %d were given" % (spec["name"], _num_bytes(spec), len(data)))


def get_output(handle: Handle, index: int) -> bytes:
    return bytes(_num_bytes(outputs(handle)[index]))  # zeros: it computes nothing


def timed_run(handle: Handle) -> float:
    if handle.sleep_s:
        time.sleep(handle.sleep_s)
    if not handle.noise:
        return handle.time_us
    return handle.time_us * max(0.1, handle.random.gauss(1.0, handle.noise))


def node_times(handle: Handle) -> dict[str, Any] | None:
    factor = handle.document["factor"]
    nodes = [dict(kernel, time_us=kernel["time_us"] * factor, compute=True) for kernel in handle.document["kernels"]]
    return {"nodes": nodes, "total_us": handle.time_us}


def _num_bytes(spec: dict[str, Any]) -> int:
    count: int = BYTES[spec["dtype"]]
    for size in spec["shape"]:
        count *= size
    return count
