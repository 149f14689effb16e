"""A *synthetic* device behind a real `Session`: the device program's core over a synthetic machine, in this process.

Nothing of a transport is in it; what the core answers over a machine's files is what it would answer there.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.device import Device
from edgeprune.device_core import Program
from edgeprune.device_probe import Opener
from edgeprune.device_state import Tree
from edgeprune.errors import EdgepruneError
from edgeprune.transport import Session


class CoreChannel:
    """Requests go straight to a `Program`; `changes` are laid over its answer to `hello`."""

    def __init__(self, program: Program, folder: Path, changes: Mapping[str, Any]) -> None:
        self.program, self.folder, self.changes = program, str(folder), changes

    def request(
        self, fields: Mapping[str, Any], silence_s: float, on_event: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        answer = self.program.answer(dict(fields))
        return {**answer, **(self.changes if fields["op"] == "hello" else {}), "id": fields["id"]}

    def put(self, paths: Sequence[Path]) -> list[str]:
        return [str(path) for path in paths]

    def get(self, remote: str, path: Path, num_bytes: int) -> None:
        path.write_bytes(Path(remote).read_bytes())

    def close(self) -> None:
        pass


def opener(
    root: Path,
    runtimes: Mapping[str, Any],
    *,
    accelerator: Mapping[str, str] | None = None,
    hello: Mapping[str, Any] | None = None,
) -> Opener:
    """Opens sessions with the machine below `root`: each runtime has a version, or an error that opening it raises."""

    @contextmanager
    def opened(device: Device) -> Iterator[Session]:
        runtime = runtimes.get(device.backend, "1")
        if isinstance(runtime, EdgepruneError):
            raise runtime
        runner: Any = types.ModuleType("runner")
        runner.NAME, runner.version = device.backend, lambda: runtime
        if accelerator and device.backend != "null":
            runner.facts = lambda: dict(accelerator)
        program = Program(runner, "0" * 12, lambda message: None)
        program.tree = Tree(str(root))
        yield Session(CoreChannel(program, root, hello or {}), {})

    return opened
