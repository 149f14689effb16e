"""What does a kernel take with plain inputs, and with those that come out of a node as in a network?

    python -m benchmarks.plain_inputs

On OpenVINO and ONNX Runtime, whose kernels are built in the second way (`makes_input` of `edgeprune.kernel_onnx`): the
times of the compute nodes, both ways interleaved in one session. Those that lose are here too: pools of channels that
are no whole blocks. Writes benchmarks/results/plain_inputs_<date>.md.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.conditions import conditions
from edgeprune.device import Device
from edgeprune.kernel import Kernel
from edgeprune.kernel_onnx import write_kernel
from edgeprune.measurement import Timing
from edgeprune.transport import open_session

RESULTS = Path(__file__).parent / "results"
TIMING = Timing(warmup_ms=20, burst_ms=10, min_rounds=8, max_rounds=8)


def _conv(c_in: int, c_out: int, size: int, window: int) -> Kernel:
    return Kernel(
        operator="conv",
        c_in=c_in,
        c_out=c_out,
        spatial=(size, size),
        window=(window, window),
        stride=(1, 1),
        padding=(window // 2, window // 2),
        dilation=(1, 1),
        epilogue=("bias", "add", "relu"),
    )


def _pool(channels: int, size: int) -> Kernel:
    plain = _plain("max_pool", channels, size)
    return replace(plain, window=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))


def _plain(operator: str, channels: int, size: int) -> Kernel:
    return Kernel(operator=operator, c_in=channels, c_out=channels, spatial=(size, size))


KERNELS = (
    _conv(64, 256, 56, 1),
    _conv(64, 64, 56, 3),
    _conv(16, 16, 32, 3),
    _conv(570, 90, 14, 1),
    _pool(64, 112),
    _pool(90, 55),
    _plain("mean", 1280, 7),
    _plain("mean", 96, 56),
    _plain("mean", 90, 56),
    _plain("mul", 1152, 7),
    _plain("mul", 96, 56),
    _plain("mul", 90, 56),
)


def main() -> int:
    parts = [f"# Kernels with plain and with made inputs, {date.today()}", ""]
    parts += [f"`python -m benchmarks.plain_inputs`: {conditions()}, one thread", ""]
    parts += ["| runtime | kernel | plain, us | nodes | made, us | nodes | plain over made |", "|---" * 7 + "|"]
    for backend in ("openvino", "onnxruntime"):
        parts += compared(backend)
    path = RESULTS / f"plain_inputs_{date.today()}.md"
    path.write_text("\n".join([*parts, ""]), encoding="utf-8")
    print("\n".join([*parts, str(path)]))
    return 0


def compared(backend: str) -> list[str]:
    """A line a kernel."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch, open_session(Device(name="inputs", backend=backend)) as session:
        for kernel in KERNELS:
            for way, is_made in (("plain", False), ("made", True)):
                folder = Path(scratch, way)
                folder.mkdir(exist_ok=True)
                path = write_kernel(kernel, folder, makes_input=is_made)
                session.load(f"{way} {kernel.key}", path, profile=True)
        session.measure([f"{way} {kernel.key}" for kernel in KERNELS for way in ("plain", "made")], timing=TIMING)
        for kernel in KERNELS:
            told = []
            for way in ("plain", "made"):
                times = session.node_times(f"{way} {kernel.key}")
                assert times is not None
                told.append([float(node["time_us"]) for node in times.nodes if node["compute"]])
            plain, made = told
            lines.append(
                f"| {backend} | {kernel.key} | {sum(plain):.1f} | {len(plain)} | {sum(made):.1f} | {len(made)} "
                f"| {sum(plain) / sum(made):.2f} |"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
