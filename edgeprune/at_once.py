"""Work on several devices at the same time: a thread each, since what they do is mostly wait for their device."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from edgeprune.errors import EdgepruneError
from edgeprune.wire import CANCELLED

Result = TypeVar("Result")


def at_once(work: Mapping[str, Callable[[], Result]]) -> dict[str, Result | EdgepruneError]:
    """What each gives, or the error that it ended with; one that fails leaves the others alone.

    A Ctrl-C reaches all of them, and they end as after one of their own: `Interrupted`, with what is saved. Any other
    exception than edgeprune's own is raised, once all have ended.
    """
    cancelled = Event()

    def run(each: Callable[[], Result]) -> Result:
        CANCELLED.set(cancelled)
        return each()

    with ThreadPoolExecutor(max_workers=max(1, len(work))) as pool:
        futures: dict[str, Future[Result]] = {
            name: pool.submit(contextvars.copy_context().run, run, each) for name, each in work.items()
        }
        try:
            wait(futures.values())
        except KeyboardInterrupt:
            cancelled.set()
            wait(futures.values())
    found: dict[str, Result | EdgepruneError] = {}
    for name, future in futures.items():
        try:
            found[name] = future.result()
        except EdgepruneError as error:
            found[name] = error
    return found
