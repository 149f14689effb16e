"""The plan: which channels and blocks of the dense model stay. JSON that can be diffed, replayed and reviewed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.eligibility import FORMATS, is_format
from edgeprune.errors import InputError
from edgeprune.folders import write_atomically

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays of the dense model.

    `kept[group id]` lists the kept positions along the dimension that names the group (`parameter:dim` of the dense
    model), in the order in which they lie in the cut model: ascending, unless channels were permuted for a pattern of
    zeros. A group that is not named stays whole. `dropped` holds block ids. `formats[parameter]` is `2:4`, `zeros:0.95`
    (so many zeros, anywhere), or `dense` as all that are not named. `notes` carries where the plan came from: budget,
    device, prediction, solver's bound.
    """

    structure_hash: str
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the plan leaves the model as it is."""
        return not self.kept and not self.dropped and not self.formats

    def to_json(self, path: Path) -> None:
        """Write the plan; the same plan gives the same bytes."""
        document = {
            "schema": SCHEMA,
            "structure_hash": self.structure_hash,
            "notes": dict(self.notes),
            "dropped": sorted(self.dropped),
            "formats": dict(sorted(self.formats.items())),
            "kept": {group: list(indices) for group, indices in sorted(self.kept.items())},
        }
        write_atomically(path, dumps(document))

    @classmethod
    def from_json(cls, path: Path) -> Plan:
        """Read a plan; `InputError` names the file, the key and what was expected there."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the plan: {error.strerror}", file=path) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"not a plan: {error}", file=path) from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise InputError(f"not a plan of schema {SCHEMA}", file=path)
        expected: dict[str, type] = {
            "structure_hash": str,
            "kept": dict,
            "dropped": list,
            "formats": dict,
            "notes": dict,
        }
        document = {"notes": {}, **document}
        for key, kind in expected.items():
            if not isinstance(document.get(key), kind):
                raise InputError(f"expected {kind.__name__}, found {document.get(key)!r}", file=path, place=key)
        for name in document["dropped"]:
            if not isinstance(name, str):
                raise InputError(f"expected names of blocks, found {name!r}", file=path, place="dropped")
        for group, indices in document["kept"].items():
            numbers = isinstance(indices, list) and all(type(i) is int for i in indices)
            if not numbers or not indices or min(indices) < 0 or len(set(indices)) < len(indices):
                raise InputError(
                    "expected positions from 0, none twice, at least one", file=path, place=f"kept.{group}"
                )
        for parameter, form in document["formats"].items():
            if not is_format(form):
                expected_forms = f"{', '.join(FORMATS)} or zeros:SHARE (zeros:0.95)"
                raise InputError(f"expected {expected_forms}, found {form!r}", file=path, place=f"formats.{parameter}")
        return cls(
            structure_hash=document["structure_hash"],
            kept={group: tuple(indices) for group, indices in document["kept"].items()},
            dropped=tuple(document["dropped"]),
            formats=document["formats"],
            notes=document["notes"],
        )


def dumps(document: Mapping[str, Any]) -> str:
    """JSON with one line a top-level entry of each mapping, so that a long plan stays readable in a diff."""

    def entry(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"    {entry(k)}: {entry(v)}" for k, v in value.items())
            lines.append(f"  {entry(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {entry(key)}: {entry(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
