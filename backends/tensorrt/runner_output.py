"""Reads what `trtexec` writes: its version, times, profiles, layers and log. A part of the runner."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from typing import Any

NOT_COMPUTE = ("Reformat", "NoOp", "Constant")
TYPES = {"int8": "int8", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32"}
"""Words of a tensor's `Format/Datatype` that name its type."""


def parse_version(text: str) -> tuple[int, ...] | None:
    """From `[TensorRT v8601]` or `[TensorRT v101303] [b9]`: 1000 or 10000 a major version, then 100 a minor one."""
    found = re.search(r"\[TensorRT v(\d[\d.]*)\]", text)
    if found is None:
        return None
    if "." in found.group(1):
        return tuple(int(part) for part in found.group(1).split(".")[:3])
    number = int(found.group(1))
    unit = 1000 if number < 10000 else 10000
    return number // unit, number % unit // 100, number % 100


def parse_times(document: Any) -> tuple[list[float], list[float]]:
    """Latency and compute time of each run in ms, from the file of `--exportTimes`.

    `latencyMs` must be the sum of its parts: were transfers left out it would be short of them.
    """
    latency_ms, compute_ms = [], []
    for entry in document if isinstance(document, list) else [document]:
        try:
            h2d, compute, d2h, latency = (float(entry[name + "Ms"]) for name in ("h2d", "compute", "d2h", "latency"))
        except (KeyError, TypeError, ValueError):
            raise RuntimeError("trtexec's times are not in the documented form: %.200r" % (entry,)) from None
        if not all(0 <= value < math.inf for value in (h2d, compute, d2h)) or not 0 < latency < math.inf:
            raise RuntimeError("trtexec told a time that is not positive: %.200r" % (entry,))
        if abs(latency - h2d - compute - d2h) > 0.01 * latency + 0.002:
            raise RuntimeError("trtexec's latency is not H2D + compute + D2H: %.200r" % (entry,))
        latency_ms.append(latency)
        compute_ms.append(compute)
    return latency_ms, compute_ms


def parse_profile(document: Any, layers: dict[str, dict[str, Any]], named: list[str]) -> list[dict[str, Any]]:
    """Layers with their time, from the file of `--exportProfile`; `named` are the nodes of the ONNX file in order."""
    nodes = []
    for entry in document if isinstance(document, list) else [document]:
        if isinstance(entry, dict) and set(entry) == {"count"}:
            continue
        try:
            name, time_ms = str(entry["name"]), float(entry.get("medianMs", entry["averageMs"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RuntimeError("trtexec's profile is not in the documented form: %.200r" % (entry,)) from None
        if not 0 <= time_ms < math.inf:
            raise RuntimeError("trtexec told a time that is no time: %.200r" % (entry,))
        layer = layers.get(name, {})
        kind = str(layer.get("LayerType", "Reformat" if name.startswith("Reformatting CopyNode") else ""))
        covers = covered(name, str(layer.get("Metadata", "")), named)
        compute = kind not in NOT_COMPUTE
        node = {"name": name, "type": kind, "time_us": time_ms * 1e3, "compute": compute, "covers": covers}
        nodes.append(dict(node, precision=precision_of(layer)))
    return nodes


def precision_of(layer: dict[str, Any]) -> str | None:
    """Of a layer: the type of its first input, as `Format/Datatype` says it (`Thirty-two wide ... Int8 format`)."""
    try:
        words = re.findall(r"[a-z0-9]+", str(layer["Inputs"][0]["Format/Datatype"]).lower())
    except (KeyError, IndexError, TypeError):
        return None  # the inspector told names alone
    return next((TYPES[word] for word in words if word in TYPES), None)


def layers_by_name(path: str) -> dict[str, dict[str, Any]]:
    """From the file of `--exportLayerInfo`: `{"Layers": [{"Name", "LayerType", "Metadata", ...}]}`, or names alone."""
    try:
        layers = read_json(path)["Layers"]
        return {layer["Name"]: layer for layer in layers if isinstance(layer, dict)}
    except (KeyError, TypeError, RuntimeError):
        return {}  # it only adds to what the profile tells


def covered(name: str, metadata: str, named: list[str]) -> list[str]:
    """Nodes of the file that went into a layer: as its metadata says, else as its name does (`conv1 + relu1`).

    `{ForeignNode[first...last]}` holds all between the two.
    """
    told = re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)
    if told:
        return [node for node in dict.fromkeys(told) if node in set(named)]
    spans = re.findall(r"ForeignNode\[(.*?)\.\.\.(.*?)\]", name)
    within = [
        node
        for first, last in spans
        if first in named and last in named
        for node in named[named.index(first) : named.index(last) + 1]
    ]
    parts = re.split(r" \+ | \|\| |[(),\[\]{}]+ ?", name)
    return within or [node for node in dict.fromkeys(part.strip() for part in parts) if node in set(named)]


def sparse_layers(log: str) -> list[str] | None:
    """Layers that run a sparse implementation, as the log of a build says: in the words of 8.x, or of 10.x."""
    found = re.search(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)", log)
    if found is not None:
        return [name.strip() for name in found.group(1).split(", ") if name.strip()]
    found = re.search(r"\(Sparsity\) Chose (\d+) layer\(s\) using sparse tactics:?(.*)", log)
    if found is None:
        return None
    names = [name.strip() for name in found.group(2).split(", ") if name.strip()]
    return names or ["?"] * int(found.group(1))


def failure(text: str, code: int) -> str:
    """What trtexec says went wrong: how it ended, and its first error lines."""
    errors = [match.strip() for match in re.findall(r"^.*?\[E\](?: \[TRT\])?(.*)$", text, re.MULTILINE)]
    words = "; ".join(dict.fromkeys(error for error in errors[:4] if error)) or last_words(text)
    if re.search(r"out of memory|OutOfMemory|insufficient memory", text, re.IGNORECASE):
        words = "out of memory: " + words
    if code < 0:
        return "trtexec was ended by %s: %s" % (signal.Signals(-code).name, words)
    return words


def last_words(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-3:])[-500:] or "it printed nothing"


def read_json(path: str) -> Any:
    """`RuntimeError` for a file that is missing, empty, cut off or has `nan` in it, which is no JSON number."""

    def refuse(name: str) -> float:
        raise ValueError("%s is no number" % name)

    try:
        with open(path) as file:
            return json.load(file, parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise RuntimeError("trtexec's %s can't be read: %s" % (os.path.basename(path), error)) from None
