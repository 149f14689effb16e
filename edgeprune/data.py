"""Calibration and evaluation data, from whatever the user has: folders of pictures, CSV, npz, a loader.

Legend: N samples, C channels, H height, W width. A *picture* is a file that is decoded when needed and may be cropped
at random; an *array* is a sample that comes ready from an npz file or a loader.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from edgeprune.errors import InputError
from edgeprune.models import call_factory, import_or_explain
from edgeprune.preprocessing import Decoder, Preprocessing, open_picture, skip

LOADER_BYTES = 2**31  # what is kept of a loader's samples
LISTED_SKIPPED = 5
CALIBRATION_VALUES = 64 * 3 * 224 * 224  # of all calibration samples together: 64 ImageNet crops
MOST_CALIBRATION_SAMPLES = 256  # smaller samples: more of them, up to this

log = logging.getLogger(__name__)
Batch: TypeAlias = tuple[torch.Tensor, "torch.Tensor | None"]
Sample: TypeAlias = npt.NDArray[Any]  # float32 [C, H, W], or the model's own shape and type without the batch
Reader: TypeAlias = "Callable[[int, int, int], Sample | None]"  # item, view, seed; None: can't be read


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples with or without labels, read when needed.

    `names[i]` names sample i (a file's path below the folder, or a number), `labels[i]` its class. `skipped` lists
    `name: reason` of what couldn't be read; it grows when a picture turns out broken while it is decoded.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    read: Reader
    items: tuple[int, ...]
    can_augment: bool = False
    is_synthetic: bool = False
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def order(self) -> list[int]:
        """The samples in the order of their names' hashes: any first part of it mixes the classes."""
        return sorted(range(len(self.names)), key=lambda i: _digest(self.names[i]))

    def batches(
        self, batch_size: int = 32, *, views: int = 1, seed: int = 0, limit: int | None = None
    ) -> Iterator[Batch]:
        """Batches (x float32 [N, C, H, W], y int64 [N] or None), the same ones at every call.

        For a model that takes integers x holds such: token ids, int64 [N, length].

        View 0 of a picture is the evaluation's crop, views 1, 2, ... are random crops from `seed`; arrays have one
        view. The samples come in `order`, all of view 0 first; `limit` is the most of them.
        """
        order = self.order
        wanted = [(i, view) for view in range(views if self.can_augment else 1) for i in order][:limit]
        x: list[Sample] = []
        y: list[int] = []
        given = 0
        for position, (i, view) in enumerate(wanted):
            sample = self.read(self.items[i], view, seed)
            if sample is not None:
                x.append(sample)
                y.append(self.labels[i] if self.labels is not None else 0)
            if x and (len(x) == batch_size or position == len(wanted) - 1):
                yield torch.from_numpy(np.stack(x)), torch.tensor(y) if self.labels is not None else None
                given += len(x)
                x, y = [], []
        if not given:
            raise InputError(f"no sample of the data can be read: {_listed(self.skipped)}")

    def calibration_views(self, most: int = MOST_CALIBRATION_SAMPLES) -> tuple[int, int]:
        """(samples, views of each picture) that a look at the data takes: 64 ImageNet crops, or more smaller ones."""
        first, _ = next(self.batches(1))
        samples = max(1, min(most, CALIBRATION_VALUES // first.numel()))
        return samples, ceil(samples / len(self))

    def hold_out(self) -> tuple[Data, Data]:
        """(held out, rest): a quarter of the samples, told by their names' hashes; none of a single one.

        Saliency and repair look at the rest, so that what is held out can tell whether a repair helps.
        """
        held = set(self.order[: max(1, round(len(self) / 4))] if len(self) > 1 else ())
        flags = [i in held for i in range(len(self))]
        return self.select(flags), self.select([not flag for flag in flags])

    def split_by_hash(self) -> tuple[Data, Data]:
        """(calibration, report): each sample's half is told by the SHA-256 of its file's name alone.

        It doesn't depend on the order, nor on which other files there are. Only where a half would be empty, the
        samples are halved in the order of their names' hashes.
        """
        if len(self) < 2:
            raise InputError(f"{len(self)} sample can't be split into calibration and report: give at least 2")
        is_report = [_digest(Path(name).name)[0] & 1 == 1 for name in self.names]
        if all(is_report) or not any(is_report):
            order = self.order
            is_report = [i in order[len(order) // 2 :] for i in range(len(self))]
        return self.select([not r for r in is_report]), self.select(is_report)

    def select(self, wanted: Sequence[bool]) -> Data:
        """The samples i with `wanted[i]`."""
        chosen = [i for i, keep in enumerate(wanted) if keep]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            labels=None if self.labels is None else tuple(self.labels[i] for i in chosen),
            items=tuple(self.items[i] for i in chosen),
        )

    def describe(self) -> str:
        """`10 samples with labels, 1 skipped`, for people."""
        kind = "random" if self.is_synthetic else "labelled" if self.labels is not None else "unlabelled"
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{len(self)} {kind} sample{'' if len(self) == 1 else 's'}{skipped}"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _listed(skipped: Sequence[str]) -> str:
    more = f" and {len(skipped) - LISTED_SKIPPED} more" if len(skipped) > LISTED_SKIPPED else ""
    return "; ".join(skipped[:LISTED_SKIPPED]) + more


def load_data(
    spec: str, preprocessing: Preprocessing | None, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Data:
    """The data that `--data` names, for a model whose first input has `shape` (N, ...) and `dtype`.

    A folder of pictures; a folder of class folders (their order is the label, or their names where all are numbers);
    a CSV of `path,label` or of paths, relative to the file; an npz with `x` and, if there are labels, `y`;
    `pkg.mod:loader`, which is called and gives batches x or (x, y). Pictures go through `preprocessing`, uint8 arrays
    through its scale, mean and std, float arrays are taken as they are. A model that takes integers (token ids) gets
    them.
    """
    path = Path(spec)
    if not dtype.is_floating_point:
        preprocessing = None
        if path.is_dir() or path.suffix == ".csv":
            kind = str(dtype).partition(".")[2]
            raise InputError(f"the model takes {kind}, pictures are made float32: give --data as npz or pkg.mod:loader")
    if path.is_dir():
        return _pictures(path, *_of_folder(path), _for_pictures(preprocessing, shape))
    if path.suffix == ".csv":
        return _pictures(path, *_of_csv(path), _for_pictures(preprocessing, shape))
    if path.suffix == ".npz":
        return _of_npz(path, preprocessing, shape, dtype)
    module, colon, _ = spec.partition(":")
    if colon and not path.exists() and all(part.isidentifier() for part in module.split(".")):
        return as_data(call_factory(spec, "data"), preprocessing, shape, dtype)
    if not path.exists():
        raise InputError("no such file or folder", file=path)
    raise InputError("expected a folder of pictures, a .csv, an .npz or pkg.mod:loader", file=path)


def synthetic(shape: Sequence[int], *, seed: int = 0, count: int = 32) -> Data:
    """Random-normal samples for a model whose input has `shape` (N, ...), marked `is_synthetic`."""
    size = tuple(shape[1:])

    def read(item: int, view: int, view_seed: int) -> Sample:
        return np.random.default_rng([seed, item]).standard_normal(size, np.float32)

    names = tuple(f"random {i}" for i in range(count))
    return Data(names=names, labels=None, read=read, items=tuple(range(count)), is_synthetic=True)


def as_data(
    source: object,
    preprocessing: Preprocessing | None = None,
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Data:
    """A `Data` as it is; any iterable of batches x or (x, y), such as a torch DataLoader, read into memory.

    For a model of floats samples are float32, for one of integers of its `dtype`; where that isn't told, int64 and
    int32 stay as they are and all else becomes float32.
    """
    if isinstance(source, Data):
        return source
    if not isinstance(source, Iterable):
        raise InputError(f"the loader gives a {type(source).__name__}, expected batches x or (x, y)")
    xs: list[npt.NDArray[Any]] = []
    ys: list[npt.NDArray[Any] | None] = []
    held = 0
    for batch in source:
        x, y = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        if isinstance(x, list | tuple | dict | str):
            raise InputError(f"the loader gives {type(x).__name__} as x, expected one array or tensor [N, ...]")
        xs.append(_array(x))
        ys.append(None if y is None else _array(y))
        held += xs[-1].nbytes
        if held > LOADER_BYTES:
            log.warning("the loader has more than %d MiB: its first %d batches are used", held >> 20, len(xs))
            break
    if not xs:
        raise InputError("the loader is empty")
    labels = [y for y in ys if y is not None]
    if len(labels) not in (0, len(ys)):
        raise InputError("the loader gives labels with some batches only")
    try:
        x, y = np.concatenate(xs), np.concatenate(labels) if labels else None
    except ValueError as error:
        raise InputError(f"the loader's batches don't fit together: {error}") from None
    return _arrays(x, y, preprocessing, shape, dtype)


def _array(values: object) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _of_npz(path: Path, preprocessing: Preprocessing | None, shape: Sequence[int], dtype: torch.dtype) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "x" not in file.files:
                raise InputError(
                    f"expected arrays x and, with labels, y; found {', '.join(file.files) or 'none'}", file=path
                )
            x, y = file["x"], file["y"] if "y" in file.files else None
        return _arrays(x, y, preprocessing, shape, dtype)
    except InputError as error:
        raise InputError(error.args[0], file=path) from None
    except Exception as error:  # numpy and zipfile raise many kinds on a broken file
        reason = "it holds what only a pickle could, which is never loaded" if "pickle" in str(error) else str(error)
        raise InputError(f"not an npz file of arrays: {reason}", file=path) from None


def _arrays(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any] | None,
    preprocessing: Preprocessing | None,
    shape: Sequence[int],
    dtype: torch.dtype | None,
) -> Data:
    size = tuple(shape[1:]) or x.shape[1:]
    last_to_first = x.ndim == 4 and len(size) == 3 and x.shape[1:] != size and (x.shape[3], *x.shape[1:3]) == size
    if x.ndim == 3 and size == (1, *x.shape[1:]):
        x = x[:, None]
    elif last_to_first:
        x = x.transpose(0, 3, 1, 2)
    if x.dtype.kind not in "fiub" or x.ndim < 2 or not len(x) or x.shape[1:] != size:
        raise InputError(f"x is {x.dtype} {x.shape}, expected numbers of shape (N, {', '.join(map(str, size))})")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0):
        raise InputError(f"y is {y.dtype} {y.shape}, expected {len(x)} class numbers from 0")
    given = _type_of_samples(x, dtype)

    def read(item: int, view: int, seed: int) -> Sample:
        if x.dtype != np.uint8 or preprocessing is None or size[0] != preprocessing.num_channels:
            return np.ascontiguousarray(x[item], given)
        sample: Sample = preprocessing.normalise(np.moveaxis(x[item], 0, -1)[None])[0]
        return sample

    labels = None if y is None else tuple(int(label) for label in y)
    return Data(names=tuple(map(str, range(len(x)))), labels=labels, read=read, items=tuple(range(len(x))))


def _type_of_samples(x: npt.NDArray[Any], dtype: torch.dtype | None) -> np.dtype[Any]:
    """What a model of `dtype` is given; `InputError` where it takes integers and x are none."""
    if dtype is None:
        return x.dtype if x.dtype in (np.int64, np.int32) else np.dtype(np.float32)
    if dtype.is_complex:
        raise InputError(f"the model takes {dtype}, data is for floats and integers")
    if dtype.is_floating_point:
        return np.dtype(np.float32)
    wanted: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"x is {x.dtype} with values that are no numbers, the model takes {wanted}")
    if x.dtype.kind == "f" and not np.array_equal(x, np.trunc(x)):
        raise InputError(f"x is {x.dtype} with fractions, the model takes {wanted}")
    with np.errstate(invalid="ignore"):
        fits = np.array_equal(x.astype(wanted), x)
    if not fits or (x.dtype.kind == "f" and np.abs(x).max() >= 2.0**63):
        raise InputError(f"x goes from {x.min()} to {x.max()}, more than the {wanted} that the model takes")
    return wanted


def _for_pictures(preprocessing: Preprocessing | None, shape: Sequence[int]) -> Preprocessing:
    found = " x ".join(map(str, shape[1:]))
    if preprocessing is None:
        raise InputError(f"the model's input ({found}) is no picture: give --data as npz or pkg.mod:loader")
    if preprocessing.shape != tuple(shape[1:]):
        given = " x ".join(map(str, preprocessing.shape))
        raise InputError(f"the preprocessing gives {given}, the model's input is {found}")
    return preprocessing


def _of_folder(folder: Path) -> tuple[list[str], list[int] | None]:
    """Paths below the folder, and labels where there are class folders."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    classes = [p for p in entries if p.is_dir()]
    files = [p.name for p in entries if p.is_file()]
    if not classes:
        return files, None
    if any(Path(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp") for name in files):
        raise InputError(
            "holds both pictures and folders: either all pictures lie in class folders or none", file=folder
        )
    numbered = all(c.name.isascii() and c.name.isdigit() for c in classes)
    names, labels = [], []
    for index, entry in enumerate(classes):
        found = sorted(p for p in entry.rglob("*") if p.is_file() and not p.name.startswith("."))
        names += [p.relative_to(folder).as_posix() for p in found]
        labels += [int(entry.name) if numbered else index] * len(found)
    return names, labels


def _of_csv(path: Path) -> tuple[list[str], list[int] | None]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [
                (number, row) for number, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV file: {error}", file=path) from None
    if rows and [cell.strip().lower() for cell in rows[0][1]] in (["path", "label"], ["path"]):
        del rows[0]
    columns = len(rows[0][1]) if rows else 0
    names, labels = [], []
    for number, row in rows:
        if len(row) != columns or columns not in (1, 2):
            raise InputError(
                f"{len(row)} columns, expected path,label in every line, or a path", file=path, place=number
            )
        names.append(row[0].strip())
        if columns == 2:
            label = row[1].strip()
            if not (label.isascii() and label.isdigit()):
                raise InputError(f"label {label!r} is no class number from 0", file=path, place=number)
            labels.append(int(label))
    return names, labels if columns == 2 else None


def _pictures(source: Path, names: list[str], labels: list[int] | None, preprocessing: Preprocessing) -> Data:
    folder = source if source.is_dir() else source.parent
    import_or_explain("PIL", "vision")
    skipped: list[str] = []
    good = []
    for i, name in enumerate(names):
        try:
            open_picture(folder / name).close()
            good.append(i)
        except OSError as error:
            skip(skipped, name, error)
    if not good:
        raise InputError(f"no picture in it{': ' if skipped else ''}{_listed(skipped)}", file=source)
    decode = Decoder(folder, tuple(names), skipped)

    def read(item: int, view: int, seed: int) -> Sample | None:
        picture = decode(item, preprocessing.num_channels)
        if picture is None:
            return None
        if view == 0:
            values = preprocessing.geometry(picture)
        else:
            key = int.from_bytes(_digest(names[item])[:8], "big")
            values = preprocessing.random_geometry(picture, np.random.default_rng([seed, view, key]))
        sample: Sample = preprocessing.normalise(values[None])[0]
        return sample

    return Data(
        names=tuple(names[i] for i in good),
        labels=None if labels is None else tuple(labels[i] for i in good),
        read=read,
        items=tuple(good),
        can_augment=True,
        skipped=skipped,
    )
