from __future__ import annotations

import pickle
import re

import pytest

from edgeprune import errors

pytestmark = pytest.mark.unit

LEAVES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.EdgepruneError) and value is not errors.EdgepruneError
]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d+)  ", errors.__doc__ or ""))
    assert drawn == {leaf.__name__: str(leaf.exit_code) for leaf in LEAVES}


def test_every_kind_is_one_leaf() -> None:
    kinds = [leaf.kind for leaf in LEAVES]
    assert len(set(kinds)) == len(kinds)
    assert errors.EdgepruneError.kind not in kinds


@pytest.mark.parametrize(
    ("file", "place", "text"),
    [(None, None, "bad"), ("a.yaml", None, "a.yaml: bad"), ("a.yaml", 3, "a.yaml:3: bad"), (None, "key", "key: bad")],
)
def test_input_error_says_where(file: str | None, place: int | str | None, text: str) -> None:
    error = errors.InputError("bad", file=file, place=place)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text  # errors come back from child processes


def test_refusal_lists_its_reasons() -> None:
    error = errors.RefusedError("nothing can be pruned", reasons=["conv1: reaches an output"])
    assert str(error) == "nothing can be pruned\n  conv1: reaches an output"


def test_did_you_mean() -> None:
    assert errors.did_you_mean("opnvino", ["openvino", "null"]) == "; did you mean 'openvino'?"
    assert errors.did_you_mean("zzz", ["openvino", "null"]) == ""
    assert errors.did_you_mean("x", []) == ""
