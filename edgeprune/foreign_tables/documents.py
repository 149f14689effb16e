"""JSON and YAML of strangers: duplicate keys refused, nothing constructed but plain data."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from edgeprune.errors import TableError


def load_json(text: str, file: str) -> Any:
    """`TableError` with the line where it isn't JSON, or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise TableError(f"the key '{twice}' stands here twice", file=file)
        return document

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise TableError(f"not JSON: {error.msg}", file=file, place=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"not JSON: {str(error)[:200]}", file=file) from None


def load_yaml(text: str, file: str) -> Any:
    """`TableError` with the line where it isn't YAML, names a key twice or holds a tag."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise TableError(f"not YAML: {(error.problem or 'unknown').strip()}", file=file, place=line) from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise TableError(f"not YAML: {str(error).splitlines()[0][:200]}", file=file) from None
