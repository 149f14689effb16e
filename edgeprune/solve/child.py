"""HiGHS in a child process that dies at once: it hears a SIGINT only when it is done.

Each message is 8 bytes of length, then an npz archive (no pickles in it). The child has its own process group, so that
Ctrl-C reaches only the parent, which kills it; it ends by itself when its standard input does, so with its parent.
"""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeprune.errors import EdgepruneError
from edgeprune.solve.program import Highs, Program, Reply, run_highs

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from edgeprune.solve.child import main; main()"
GRACE_S = 5.0
"""How long after its time limit the child is left alone."""


@contextmanager
def highs_in_child() -> Iterator[Highs]:
    """`run_highs` in a child process, started by the first call; whatever interrupts the caller kills the child."""
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as complaints:

        def call(program: Program, rel_gap: float, seconds: float) -> Reply:
            if not children or children[-1].poll() is not None:
                children.append(_started(complaints))
            request = {**program.arrays(), "rel_gap": rel_gap, "seconds": seconds}
            reply = _asked(children[-1], request, seconds + GRACE_S)
            if reply is None:
                raise EdgepruneError(f"the solver's process ended: {_tail(complaints)}")
            if "error" in reply:
                raise EdgepruneError(str(reply["error"]))
            bound = float(reply["bound"])
            x = reply["x"] if len(reply["x"]) else None
            return Reply(status=int(reply["status"]), x=x, bound=None if np.isnan(bound) else bound)

        try:
            yield call
        finally:
            for child in children:
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    _close(pipe)


def _started(complaints: IO[bytes]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if entry] + [root]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START, json.dumps(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _tail(complaints: IO[bytes]) -> str:
    complaints.seek(0)
    return complaints.read().decode("utf-8", "replace").strip().rsplit("\n", 1)[-1] or "no message"


def _asked(child: subprocess.Popen[bytes], request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """The reply; None when the child is gone. A child that takes longer than `seconds` is killed and says stopped."""
    assert child.stdin is not None and child.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        _send(child.stdin, request)
        reply = _received(child.stdout)
    except BrokenPipeError:
        reply = None
    finally:
        timer.cancel()
    if reply is None and late.is_set():
        return {"status": 1, "x": np.zeros(0), "bound": np.nan}
    return reply


def _send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **message)
    pipe.write(buffer.getbuffer().nbytes.to_bytes(8, "little"))
    pipe.write(buffer.getbuffer())
    pipe.flush()


def _received(pipe: IO[bytes]) -> dict[str, Any] | None:
    """None at the end of the pipe."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    body = pipe.read(length)
    if len(body) < length:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        pass


def main() -> None:
    """The child's side. Standard output becomes standard error, because HiGHS prints to it now and then."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = requests.get()
        rel_gap, seconds = float(request.pop("rel_gap")), float(request.pop("seconds"))
        try:
            reply = run_highs(Program(**request), rel_gap, seconds)
        except EdgepruneError as error:
            _send(replies, {"error": str(error)})
            continue
        bound = np.nan if reply.bound is None else reply.bound
        x = np.zeros(0) if reply.x is None else reply.x
        _send(replies, {"status": reply.status, "x": x, "bound": bound})


def _listen(requests: queue.Queue[dict[str, Any]]) -> None:
    """Requests as they come; the end of standard input is the end of the process, whatever it is doing."""
    while (request := _received(sys.stdin.buffer)) is not None:
        requests.put(request)
    os._exit(1)
