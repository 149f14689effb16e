"""Holds clocks while something is measured: a part of the device program (standard library, Python 3.8).

Whatever ends the program (its input's end, a kill, a cut connection), the clocks go back: a *guard*, a process in a
session of its own, waits for the end of a pipe that only the program holds open, and then undoes what was done.

Jetson: `jetson_clocks --store`, `jetson_clocks`, `jetson_clocks --restore`. NVIDIA cards: `nvidia-smi -lgc` to the
largest clock, `-rgc` afterwards. Any other: the cpufreq governor `performance`, the former one afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

GUARD = """
import json, os, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
orders = json.loads(sys.argv[1])
sys.stdin.buffer.read()
for order in orders:
    try:
        if "path" in order:
            with open(order["path"], "w") as file:
                file.write(order["text"])
        elif "remove" in order:
            os.remove(order["remove"])
        else:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 60}
            subprocess.run(order["command"], input=order.get("text", "").encode(), **quiet)
    except Exception:
        pass
"""
GOVERNORS = "sys/devices/system/cpu/cpufreq/policy[0-9]*/scaling_governor"


class Clocks:
    """The clocks of one machine; `tree` is a `Tree` of `device_state.py`."""

    def __init__(self, tree: Any, wait_s: float = 20.0) -> None:
        """`wait_s`: how long the clocks of a run that has just ended may take to go back."""
        self.tree, self.wait_s = tree, wait_s
        self.guard: Any = None
        self.steps: list[dict[str, Any]] = []

    def hold(self) -> list[str]:
        """Hold them; gives what is held. `RuntimeError` that says what to run where it isn't allowed."""
        if self.guard is not None:
            return []
        with open(os.path.join(tempfile.gettempdir(), "edgeprune-clocks-%d.lock" % os.getuid()), "a") as lock:
            self._wait_for(lock)
            self._hold(lock.fileno())  # the guard keeps the lock until the clocks are back
        return [step["what"] for step in self.steps]

    def _wait_for(self, lock: Any) -> None:
        deadline = time.monotonic() + self.wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError("another run holds the clocks of this machine: wait for its end") from None
            time.sleep(0.05)

    def release(self) -> None:
        """Put them back, and wait until they are."""
        if self.guard is not None:
            self.guard.stdin.close()
            self.guard.wait(120)
            self.guard = None

    def _hold(self, lock: int) -> None:
        self.steps = self._steps()
        undo = [order for step in reversed(self.steps) for order in step["undo"]]
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD, json.dumps(undo)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),
        )
        for step in self.steps:
            for order in step["do"]:
                said = carried_out(order)
                if said is not None:
                    self.release()
                    raise RuntimeError("the clocks can't be held (%s): %s" % (said, step["by_hand"]))

    def _steps(self) -> list[dict[str, Any]]:
        """What to do, how it is undone, and what a person would run instead."""
        if shutil.which("jetson_clocks") is not None:
            return [self._jetson()]
        steps = [self._card()] if self.tree.ask("nvidia-smi", "-L") else []
        policies = [path for path in self.tree.paths(GOVERNORS) if self.tree.text(path) != "performance"]
        if policies:
            steps.append(self._governor(policies))
        if not steps and not self.tree.paths(GOVERNORS):
            raise RuntimeError(
                "nothing here lets its clocks be held: no jetson_clocks, no NVIDIA card, no cpufreq (a virtual "
                "machine has none): leave out --lock-clocks"
            )
        return steps

    def _jetson(self) -> dict[str, Any]:
        handle, path = tempfile.mkstemp(prefix="edgeprune-clocks-")
        os.close(handle)
        os.remove(path)  # jetson_clocks asks before it writes over a file
        return {
            "what": "jetson_clocks",
            "do": [_as_root("jetson_clocks", "--store", path), _as_root("jetson_clocks")],
            "undo": [_as_root("jetson_clocks", "--restore", path), _as_root("rm", "-f", path)],
            "by_hand": "run `sudo jetson_clocks --store && sudo jetson_clocks` there, measure without --lock-clocks, "
            "then `sudo jetson_clocks --restore`; or let %s run jetson_clocks by sudo without a password" % _user(),
        }

    def _card(self) -> dict[str, Any]:
        query = self.tree.ask("nvidia-smi", "--query-gpu=clocks.max.graphics", "--format=csv,noheader,nounits")
        clock = query.splitlines()[0].strip() if query else ""
        if not clock.isdigit():
            raise RuntimeError("nvidia-smi tells no largest clock (%r): hold it by `nvidia-smi -lgc` yourself" % clock)
        return {
            "what": "nvidia-smi -lgc %s" % clock,
            "do": [_as_root("nvidia-smi", "-lgc", "%s,%s" % (clock, clock))],
            "undo": [_as_root("nvidia-smi", "-rgc")],
            "by_hand": "run `sudo nvidia-smi -lgc %s,%s` there, measure without --lock-clocks, then `sudo nvidia-smi "
            "-rgc`" % (clock, clock),
        }

    def _governor(self, policies: list[str]) -> dict[str, Any]:
        full = [os.path.join(self.tree.root, path) for path in policies]
        before = [self.tree.text(path) for path in policies]
        return {
            "what": "cpufreq governor performance",
            "do": [_written(path, "performance") for path in full],
            "undo": [_written(path, governor) for path, governor in zip(full, before)],
            "by_hand": "run `echo performance | sudo tee /%s` there, measure without --lock-clocks, then the same with "
            "%s" % (GOVERNORS, before[0]),
        }


def carried_out(order: dict[str, Any]) -> str | None:
    """None, or what went wrong."""
    try:
        if "path" in order:
            with open(order["path"], "w") as file:
                file.write(order["text"])
            return None
        done = subprocess.run(
            order["command"],
            input=order.get("text", "").encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    words = done.stdout.decode(errors="replace").strip().splitlines()
    return None if done.returncode == 0 else (words[-1] if words else "exit code %d" % done.returncode)[:300]


def _as_root(*command: str) -> dict[str, Any]:
    return {"command": list(command) if os.geteuid() == 0 else ["sudo", "-n", *command]}


def _written(path: str, text: str) -> dict[str, Any]:
    """Directly where that is allowed, else by `sudo -n tee`."""
    if os.access(path, os.W_OK):
        return {"path": path, "text": text}
    return dict(_as_root("tee", path), text=text)


def _user() -> str:
    return os.environ.get("USER") or "this user"
