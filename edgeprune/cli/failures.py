"""What an exception becomes at the command line: one message and an exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from contextlib import suppress

import click

from edgeprune import errors
from edgeprune.folders import DISK_FAULTS

_STORAGE = DISK_FAULTS | {errno.EACCES, errno.EPERM}


def report(error: BaseException, *, as_json: bool, verbose: bool) -> int:
    """Print `error: ...` on stderr, or one JSON document on stdout; gives the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader has gone: nobody to tell
        return 1
    failure = failure_of(error)
    if verbose or os.environ.get("EDGEPRUNE_DEBUG"):
        traceback.print_exception(error)
    with suppress(OSError):
        if as_json:
            document = {"kind": failure.kind, "message": str(failure), "exit_code": failure.exit_code}
            click.echo(json.dumps({"error": document}))
        else:
            click.echo(f"error: {failure}", err=True)
        flush_stdout()
    return failure.exit_code


def failure_of(error: BaseException) -> errors.EdgepruneError:
    """The member of the error tree that stands for any exception."""
    if isinstance(error, errors.EdgepruneError):
        return error
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return errors.Interrupted()
    if isinstance(error, click.UsageError):
        hint = f" (try: {error.ctx.command_path} --help)" if error.ctx else ""
        return errors.UsageError(error.format_message() + hint)
    if isinstance(error, click.ClickException):
        return errors.InputError(error.format_message())
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return errors.StorageError(f"{error.filename or 'output'}: {error.strerror}")
    return errors.InternalError(f"internal error: {type(error).__name__}: {error} (EDGEPRUNE_DEBUG=1 shows where)")


def flush_stdout() -> None:
    """Flush; when that fails, let go of stdout, so that the interpreter doesn't fail on it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
