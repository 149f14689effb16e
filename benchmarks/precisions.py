"""Kernels in every precision that the runtimes here compute in: how long, by whose word, and with which steps.

    python -m benchmarks.precisions --out benchmarks/results/precisions_DATE.md              # about 3 minutes
    python -m benchmarks.precisions --device host-tflite --out ... --append                  # of one runtime, behind it

Times are ratios to one kernel that is fp32 in every session (the memory reference of `profile`), so that precisions of
a runtime compare though OpenVINO needs a session for each. A kernel counts only where the runtime's own listing says
that it ran in its precision; where it didn't, the last column says what it ran in.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import edgeprune as ep
from edgeprune.device import Device, in_precision
from edgeprune.fingerprint import fingerprint_of
from edgeprune.kernel import Kernel
from edgeprune.measurement import KERNELS
from edgeprune.modelled import backend_of
from edgeprune.precision import refusal, shares_of
from edgeprune.preparing import node_latencies
from edgeprune.profiler import statistics_of
from edgeprune.profiling import profile
from edgeprune.references import COMPUTE, MEMORY, load_references
from edgeprune.staircase import Stairs, find_staircase, staircase_kernels
from edgeprune.transport import open_session

DEVICES = ("host-openvino", "host-onnxruntime", "host-tflite")


def conv(c_in: int, c_out: int, size: int, window: int = 3, groups: int = 1) -> Kernel:
    """A convolution with bias and ReLU over size x size pixels."""
    return Kernel(
        operator="conv",
        c_in=c_in,
        c_out=c_out,
        spatial=(size, size),
        window=(window, window),
        stride=(1, 1),
        padding=(window // 2, window // 2),
        dilation=(1, 1),
        groups=groups,
        epilogue=("bias", "relu"),
    )


SHOWN = {
    "conv 3x3, 64>64, 28x28": conv(64, 64, 28),
    "conv 3x3, 256>256, 14x14": conv(256, 256, 14),
    "pointwise, 96>576, 14x14": conv(96, 576, 14, window=1),
    "depthwise 3x3, 576, 14x14": conv(576, 576, 14, groups=576),
    "linear, 384>1536, 196 rows": Kernel(operator="linear", c_in=384, c_out=1536, spatial=(196,), epilogue=("bias",)),
    "add, 256, 28x28": Kernel(operator="add", c_in=256, c_out=256, spatial=(28, 28)),
    "max pool 3x3, 64, 56x56": replace(conv(64, 64, 56), operator="max_pool", epilogue=()),
}


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A kernel's compute time over the memory reference, the runtime's node for it, and why it doesn't count."""

    ratio: float
    node: str
    refused: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="append", choices=DEVICES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--append", action="store_true")
    options = parser.parse_args()
    devices = [ep.load_device(name) for name in options.device or DEVICES]
    devices = [device for device in devices if backend_of(device).available() is None]
    lines = [line for device in devices for line in section(device)]
    before = [f"# Kernels by precision, {date.today()}", "", *(__doc__ or "").splitlines(), ""]
    text = options.out.read_text(encoding="utf-8") if options.append else "\n".join(before) + "\n"
    options.out.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def section(device: Device) -> Iterator[str]:
    """What one runtime takes, and its steps."""
    timed, stairs, told = {}, {}, ""
    for precision in device.precisions:
        timed[precision], told = measured(in_precision(device, precision), precision)
        stairs[precision] = steps(in_precision(device, precision), precision)
    yield from (f"## {device.name}: {told}", "")
    yield f"| compute time over fp32's | {' | '.join(device.precisions)} | ran as |"
    yield "|---|" + "---|" * (len(device.precisions) + 1)
    for name in SHOWN:
        fp32 = timed["fp32"][name].ratio
        cells = ["fell back" if found[name].refused else f"{found[name].ratio / fp32:.2f}" for found in timed.values()]
        nodes = [f"{precision}: {found[name].refused or found[name].node}" for precision, found in timed.items()]
        yield f"| {name} | {' | '.join(cells)} | {'; '.join(nodes)} |"
    yield from ("", f"| steps in, out (ragged %) | {' | '.join(device.precisions)} |")
    yield "|---|" + "---|" * len(device.precisions)
    for family in ("conv", "pointwise", "depthwise", "linear"):
        yield f"| {family} | {' | '.join(described(stairs[p].get(family)) for p in device.precisions)} |"
    yield ""


def measured(device: Device, precision: str) -> tuple[dict[str, Timed], str]:
    """All shown kernels in one session, and what the session runs on."""
    found = {}
    backend = backend_of(device)
    with open_session(device, precision=precision) as session, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        load_references(session, device, precision, folder)
        kernels = {name: replace(kernel, precision=precision) for name, kernel in SHOWN.items()}
        notes = {}
        for name, kernel in kernels.items():
            try:
                notes[name] = session.load(kernel.key, backend.build(kernel, folder), profile=True).notes
            except ValueError as error:
                found[name] = Timed(ratio=0.0, node="", refused=str(error).partition(": ")[2])
        keys = [kernels[name].key for name in notes]
        anchors = dict.fromkeys(keys, MEMORY)
        result = session.measure(keys, [COMPUTE, MEMORY], timing=KERNELS, anchors=anchors, seed=0)
        for name, note in notes.items():
            key, nodes = kernels[name].key, session.node_times(kernels[name].key)
            ratio = float(statistics_of(key, result)["reference_ratio"])
            alone = nodes.within(result.percentile_us(key)) / result.percentile_us(key) if nodes else 1.0
            kinds = [node["type"] for node in nodes.nodes if node["compute"]] if nodes else ["its operators"]
            shares = shares_of(nodes) or note.get("ran_in")
            found[name] = Timed(ratio=ratio * alone, node=" + ".join(kinds), refused=refusal(kernels[name], shares))
        told = fingerprint_of(device, precision, session.hello()).describe()
    return found, told.replace(f", {precision}", "")


def steps(device: Device, precision: str) -> dict[str, Stairs]:
    """The stairs of each family, from a table of its own."""
    with tempfile.TemporaryDirectory() as folder:
        table = profile(staircase_kernels(precision), device, table_path=Path(folder, "table.jsonl"))
    return dict(find_staircase(node_latencies(table), precision).families)


def described(stairs: Stairs | None) -> str:
    if stairs is None:
        return "not measured"
    return f"{stairs.c_in}, {stairs.c_out} ({stairs.ragged_in:.0%}, {stairs.ragged_out:.0%})"


if __name__ == "__main__":
    main()
