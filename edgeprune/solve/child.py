"""The search in a child process that dies at once: HiGHS hears a SIGINT only when it is done.

One JSON line in, one out. The child has its own process group, so that Ctrl-C reaches only the parent, which kills it;
it ends by itself when its parent does, because it watches for the end of its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from edgeprune.errors import EdgepruneError
from edgeprune.solve.answer import Answer
from edgeprune.solve.problem import Problem

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from edgeprune.solve.child import main; main()"


def search_in_child(problem: Problem, *, gap: float, time_limit_s: float | None) -> Answer | None:
    """`search` in a child process; whatever interrupts the caller kills the child first."""
    root = str(Path(__file__).resolve().parents[2])
    path = [entry for entry in sys.path if entry] + [root]
    request = json.dumps({"problem": problem.to_document(), "gap": gap, "time_limit_s": time_limit_s})
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            line = _asked(child, request)
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
        if not line:
            complaints.seek(0)
            tail = complaints.read().decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
            raise EdgepruneError(f"the solver's process ended with {child.returncode}: {tail or 'no message'}")
    reply = json.loads(line)
    if "error" in reply:
        raise EdgepruneError(reply["error"])
    if reply["answer"] is None:
        return None
    answer = reply["answer"]
    return Answer(
        choice=None if answer["choice"] is None else tuple(answer["choice"]),
        upper_bound=answer["upper_bound"],
        least=tuple(answer["least"]),
        value_range=answer["value_range"],
    )


def _asked(child: subprocess.Popen[bytes], request: str) -> bytes:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(request.encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return b""
    return child.stdout.readline()


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        pass


def main() -> None:
    """The child's side. Standard output becomes standard error, because HiGHS prints to it now and then."""
    from edgeprune.solve.search import search  # only here: scipy.optimize is slow to import

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    started = time.monotonic()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit = request["time_limit_s"]
    deadline = started + limit if limit is not None else float("inf")
    try:
        answer = search(Problem.from_document(request["problem"]), gap=request["gap"], deadline=deadline)
        reply: dict[str, object] = {"answer": None if answer is None else vars(answer)}
    except EdgepruneError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), file=answers, flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)
