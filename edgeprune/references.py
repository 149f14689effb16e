"""The two kernels that every session times beside what it measures: all times are ratios to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.kernel import Kernel
from edgeprune.modelled import installed
from edgeprune.transport import Session

if TYPE_CHECKING:
    from edgeprune.device import Device

COMPUTE = "compute"
MEMORY = "memory"


def reference_kernels(precision: str) -> dict[str, Kernel]:
    """What every session times beside its candidates: one kernel bound by arithmetic, one by memory.

    All ratios are taken to the first. The second moves 3 MB, more than a core has to itself: far larger ones, in the
    last shared cache or beyond it, varied by 6 to 9 % between sessions where this one did by 2 %.
    In bf16 and int8 tables it stays fp32: not every runtime adds in bf16, and in int8 a core has room for it.
    """
    conv = Kernel(
        operator="conv",
        c_in=64,
        c_out=64,
        spatial=(28, 28),
        window=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        epilogue=("bias", "relu"),
        precision=precision,
    )
    memory = "fp32" if precision in ("bf16", "int8") else precision
    add = Kernel(operator="add", c_in=256, c_out=256, spatial=(32, 32), precision=memory)
    return {COMPUTE: conv, MEMORY: add}


def load_references(session: Session, device: Device, precision: str, folder: Path) -> tuple[str, ...]:
    """Build and load the two reference kernels; gives their keys, the compute-bound one first."""
    backend = installed(device, only_to_time=True)  # of a remote device: what its models are written with, here
    references = reference_kernels(precision)
    for name, kernel in references.items():
        session.load(name, backend.build(kernel, folder))
    return tuple(references)
