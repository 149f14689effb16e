"""edgeprune: say the latency, get the engine.

The stages in the order in which data flows, each a function over data; every name is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.cost import cost_model
    from edgeprune.device import load_device
    from edgeprune.exporting import export
    from edgeprune.graph import trace
    from edgeprune.loading import load_bundle
    from edgeprune.planning import plan
    from edgeprune.profiling import profile
    from edgeprune.recovery import recover
    from edgeprune.surgery import apply
    from edgeprune.units import kernels
    from edgeprune.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "apply",
    "cost_model",
    "export",
    "kernels",
    "load_bundle",
    "load_device",
    "plan",
    "profile",
    "recover",
    "trace",
    "verify",
]

_HOME = {
    "load_bundle": "edgeprune.loading",
    "load_device": "edgeprune.device",
    "trace": "edgeprune.graph",
    "kernels": "edgeprune.units",
    "profile": "edgeprune.profiling",
    "cost_model": "edgeprune.cost",
    "plan": "edgeprune.planning",
    "apply": "edgeprune.surgery",
    "recover": "edgeprune.recovery",
    "export": "edgeprune.exporting",
    "verify": "edgeprune.verifying",
}


if not TYPE_CHECKING:  # mypy knows the names from the imports above and reports any other

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'edgeprune' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
