"""What a measurement belongs to: the machine, the runtime, how it was pinned and how kernels are built for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune.backends import find_backend

if TYPE_CHECKING:
    from edgeprune.device import Device

_ISA = re.compile(r"sse4|avx|amx|fma|f16c|vnni|neon|asimd|sve|sme|i8mm|bf16|fphp")  # shown; the hash covers all flags


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Facts as plain JSON; equal hash, comparable times."""

    facts: Mapping[str, Any]

    @property
    def short_hash(self) -> str:
        """12 hex digits."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]

    def describe(self) -> str:
        """For messages: `AMD EPYC (family 26 model 2 stepping 1), 2 cores, openvino 2026.4.1, fp32, 1 thread`."""
        return describe(self.facts)


def fingerprint_of(device: Device, precision: str, hello: Mapping[str, Any], regime: str = "hot") -> Fingerprint:
    """`hello` is the device program's answer. A modelled device has no machine: its formula is the same everywhere."""
    modelled = bool(hello["modelled"])
    facts: dict[str, Any] = {
        "backend": device.backend,
        "version": hello["version"],
        "precision": precision,
        "regime": regime,
        "modelled": modelled,
        "options": dict(sorted(device.options.items())),
    }
    if device.roofline is not None:
        facts["roofline"] = device.roofline.model_dump(mode="json", exclude={"sources"})
    if not modelled:
        facts |= {
            "cpu": _cpu(hello["cpu"]),
            "threads": device.threads,
            "streams": device.streams,
            "hint": device.hint,
            "affinity": list(device.affinity) if device.affinity else None,
        }
        facts |= {name: dict(hello[name]) for name in ("accelerator", "board") if hello.get(name)}
        if device.lock_clocks:
            facts["clocks"] = "held"
        kernels = getattr(find_backend(device.backend), "kernels", 1)
        if kernels > 1:
            facts["kernels"] = kernels
    return Fingerprint(facts=facts)


def describe(facts: Mapping[str, Any]) -> str:
    parts = []
    cpu = facts.get("cpu")
    if cpu:
        numbers = " ".join(f"{word} {cpu[word]}" for word in ("family", "model", "stepping") if word in cpu)
        parts += [f"{cpu.get('name', cpu.get('machine', 'CPU'))} ({numbers})", f"{cpu.get('cores')} cores"]
    told = {**facts.get("accelerator", {}), **facts.get("board", {})}
    parts += [str(told[word]) for word in ("board", "power_mode", "gpu") if word in told]
    parts += [f"{facts.get('backend')} {facts.get('version')}", str(facts.get("precision"))]
    if facts.get("kernels", 1) > 1:
        parts.append(f"kernels of form {facts['kernels']}")
    if "threads" in facts:
        parts.append(f"{facts['threads']} thread" + "s" * (facts["threads"] != 1))
    return ", ".join(parts)


def _cpu(facts: Mapping[str, Any]) -> dict[str, Any]:
    flags = facts.get("flags", [])
    kept = {name: value for name, value in facts.items() if name != "flags"}
    kept["isa"] = [flag for flag in flags if _ISA.search(flag)]
    kept["flags_hash"] = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
    return kept
