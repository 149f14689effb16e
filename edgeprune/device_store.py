"""Models on a remote device by what is in them: a part of the device program, for whoever can't open the host's files.

Runs on the device (Python 3.8 or later, standard library only): `device_core` has it pasted in. A model is one or
two files (`.xml` and `.bin`), in a folder of its own named by the hash of both. It appears whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = re.compile(r"[0-9a-f]{64}\Z")
SUFFIX = re.compile(r"(\.[A-Za-z0-9_]{1,16}){0,3}\Z")
CHUNK = 1 << 20
MOST_GIVEN = 8 << 20  # bytes of a file in one answer


class Store:
    """The folder `models`: at most `limit` bytes of it beside what is in use; `read(n)` gives n bytes of stdin."""

    def __init__(self, folder: str, limit: int, read: Callable[[int], bytes]) -> None:
        self.models = os.path.join(folder, "models")
        self.scratch = os.path.join(folder, "scratch")
        self.limit = limit
        self.read = read
        for name in os.listdir(self.models):
            if not KEY.match(name):  # left over from one that was cut off
                shutil.rmtree(os.path.join(self.models, name), ignore_errors=True)

    def missing(self, keys: list[str]) -> list[str]:
        """Those that are not here; the others count as used just now."""
        found = []
        for key in keys:
            try:
                os.utime(self.place(key))
            except OSError:
                found.append(key)
        return found

    def place(self, key: str) -> str:
        if not KEY.match(key):
            raise ValueError("%r is no name of a model" % key)
        return os.path.join(self.models, key)

    def put(self, models: list[dict[str, Any]], in_use: set[str]) -> None:
        """Take models whose bytes follow the request, one file after the other. All bytes are taken, come what may."""
        failure: Exception | None = None
        for model in models:
            total = sum(int(file["size"]) for file in model["files"])
            try:
                if failure is None:
                    self.make_room(total, in_use)
                    self.put_one(model)
                    in_use = in_use | {model["key"]}
                    continue
            except (OSError, ValueError) as error:
                failure = error
            self.skip(model)
        if isinstance(failure, OSError):
            raise OSError(failure.errno, "cannot write %s: %s" % (self.models, failure.strerror))
        if failure is not None:
            raise failure

    def put_one(self, model: dict[str, Any]) -> None:
        final = self.place(model["key"])
        folder = final + ".new"
        shutil.rmtree(folder, ignore_errors=True)
        self.taken = 0
        try:
            os.mkdir(folder, 0o700)
            for file in model["files"]:
                self.take(folder, file)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(folder, final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def take(self, folder: str, file: dict[str, Any]) -> None:
        if not SUFFIX.match(file["suffix"]):
            raise ValueError("%r is no suffix of a model" % file["suffix"])
        digest, left = hashlib.sha256(), int(file["size"])
        with open(os.path.join(folder, "model" + file["suffix"]), "wb") as written:
            while left:
                chunk = self.chunk(left)
                left -= len(chunk)
                digest.update(chunk)
                written.write(chunk)
        if digest.hexdigest() != file["sha256"]:
            raise ValueError("a model arrived damaged")

    def chunk(self, left: int) -> bytes:
        chunk = self.read(min(left, CHUNK))
        if not chunk:
            os._exit(9)  # whoever sends is gone
        self.taken += len(chunk)
        return chunk

    def skip(self, model: dict[str, Any]) -> None:
        """Read what is left of a model that can't be kept: the next request comes after it."""
        left = sum(int(file["size"]) for file in model["files"]) - self.taken
        while left > 0:
            left -= len(self.chunk(left))
        self.taken = 0

    def make_room(self, wanted: int, in_use: set[str]) -> None:
        """Remove the models that were not used for longest, until `wanted` bytes more are within the limit."""
        self.taken = 0
        sizes, ages = {}, {}
        for key in os.listdir(self.models):
            folder = os.path.join(self.models, key)
            try:
                ages[key] = os.stat(folder).st_mtime
                sizes[key] = sum(os.stat(os.path.join(folder, name)).st_size for name in os.listdir(folder))
            except OSError:
                continue
        free = shutil.disk_usage(self.models).free
        total = sum(sizes.values())
        for key in sorted(sizes, key=lambda key: ages[key]):
            if total + wanted <= self.limit and wanted <= free:
                break
            if key not in in_use:
                shutil.rmtree(os.path.join(self.models, key), ignore_errors=True)
                total -= sizes[key]
                free += sizes[key]

    def given(self, path: str, offset: int) -> dict[str, Any]:
        """A piece of a file that the program has written, and its whole size."""
        real = os.path.realpath(path)
        if os.path.dirname(real) != os.path.realpath(self.scratch):
            raise ValueError("%s is outside of %s" % (path, self.scratch))
        with open(real, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            return {"size": size, "data": base64.b64encode(file.read(MOST_GIVEN)).decode()}
