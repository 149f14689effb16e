"""Bookkeeping of coupling: exact examples, and properties checked against every way in which atoms can go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.graph.atoms import FREE, Atoms, concatenated, is_free, merged, no_atoms
from edgeprune.graph.structure import Indices, Refusal

pytestmark = pytest.mark.unit

WHY = Refusal(operator="add", where="layer", reason="why not")
LATER = Refusal(operator="mul", where="layer", reason="too late")
Alive = npt.NDArray[Any]


def roots(atoms: Atoms, dim: Indices) -> list[list[int]]:
    found: list[list[int]] = atoms.roots(dim).tolist()
    return found


def test_a_new_dimension_has_an_atom_an_index() -> None:
    atoms = Atoms()
    assert atoms.new(3).tolist() == [[0, 1, 2]]
    assert atoms.new(2).tolist() == [[3, 4]]
    assert is_free(no_atoms(2)) and not is_free(atoms.new(1))


def test_a_parameter_has_the_same_atoms_each_time_it_is_read() -> None:
    atoms = Atoms()
    first, again = atoms.of_parameter("weight", (2, 3)), atoms.of_parameter("weight", (2, 3))
    assert [dim.tolist() for dim in first] == [dim.tolist() for dim in again] == [[[0, 1]], [[2, 3, 4]]]


def test_united_dimensions_have_common_roots() -> None:
    atoms = Atoms()
    a, b, c = atoms.new(2), atoms.new(2), atoms.new(2)
    atoms.unite(a, b, WHY)
    atoms.unite(b, c[:, ::-1], WHY)
    assert roots(atoms, a) == roots(atoms, b) == [[0, 1]]
    assert roots(atoms, c) == [[1, 0]]
    assert atoms.refusals == []


def test_an_atom_that_meets_none_must_stay_for_the_first_reason_given() -> None:
    atoms = Atoms()
    a = atoms.new(3)
    atoms.unite(a, concatenated([no_atoms(1), a[:, 1:]]), WHY)
    atoms.fix(a[:, :2], LATER)
    assert [atoms.must_stay(atom) for atom in range(3)] == [WHY, LATER, None]


def test_what_must_stay_stays_when_it_is_united_later() -> None:
    atoms = Atoms()
    a, b = atoms.new(2), atoms.new(2)
    atoms.fix(b[:, :1], WHY)
    atoms.unite(a, b, LATER)
    assert [atoms.must_stay(root) for root in roots(atoms, a)[0]] == [WHY, None]


def test_tied_indices_have_one_root() -> None:
    atoms = Atoms()
    dim = atoms.new(3)
    atoms.tie(dim, WHY)
    assert roots(atoms, dim) == [[0, 0, 0]]


def test_dimensions_of_different_sizes_cannot_be_united() -> None:
    atoms = Atoms()
    with pytest.raises(ValueError, match="dimensions of 2 and 3 indices can't be tied"):
        atoms.unite(atoms.new(2), atoms.new(3), WHY)


def test_merged_dimensions_are_a_product() -> None:
    atoms = Atoms()
    heads, width = atoms.new(2), atoms.new(3)
    assert merged([heads, width]).tolist() == [[0, 0, 0, 1, 1, 1], [2, 3, 4, 2, 3, 4]]
    assert merged([no_atoms(2), width]).tolist() == [[2, 3, 4, 2, 3, 4]]
    assert is_free(merged([no_atoms(2), no_atoms(3)]))


def test_a_divided_dimension_is_split_into_a_product() -> None:
    atoms = Atoms()
    features = atoms.new(6)
    heads, width = atoms.divided(features, (2, 3), WHY)
    assert (heads.tolist(), width.tolist()) == ([[6, 7]], [[8, 9, 10]])
    assert roots(atoms, features) == [[6, 6, 6, 7, 7, 7], [8, 9, 10, 8, 9, 10]]


def test_what_was_merged_is_divided_into_what_it_was() -> None:
    atoms = Atoms()
    heads, width = atoms.new(2), atoms.new(3)
    first, second = atoms.divided(merged([heads, width]), (2, 3), WHY)
    assert (first.tolist(), second.tolist()) == (heads.tolist(), width.tolist())


def test_products_are_united_factor_by_factor() -> None:
    atoms = Atoms()
    q, k = atoms.new(6), atoms.new(6)
    heads_q, width_q = atoms.divided(q, (2, 3), WHY)
    heads_k, width_k = atoms.divided(k, (2, 3), WHY)
    atoms.unite(q, k, WHY)
    assert roots(atoms, heads_q) == roots(atoms, heads_k)
    assert roots(atoms, width_q) == roots(atoms, width_k)
    assert atoms.refusals == []


def test_a_split_atom_that_must_stay_leaves_that_to_its_factors() -> None:
    atoms = Atoms()
    features = atoms.new(4)
    atoms.fix(features[:, :1], WHY)
    heads, width = atoms.divided(features, (2, 2), LATER)
    assert [atoms.must_stay(root) for root in (*roots(atoms, heads)[0], *roots(atoms, width)[0])] == [
        WHY,
        None,
        WHY,
        None,
    ]


def test_beside_others_what_must_stay_is_left_out() -> None:
    atoms = Atoms()
    heads, width = atoms.new(2), atoms.new(2)
    product = merged([heads, width])
    atoms.fix(heads, WHY)
    assert roots(atoms, product) == [[2, 3, 2, 3]]
    assert atoms.roots(product, whole=True).tolist() == [[0, 0, 1, 1], [2, 3, 2, 3]]


def assignments(atoms: Atoms, dims: list[Indices]) -> Iterator[list[Alive]]:
    """For every set of roots that may go together which indices of the dimensions live."""
    canonical = [atoms.roots(dim) for dim in dims]
    found = np.unique(np.concatenate([rows.ravel() for rows in canonical]))
    loose = [root for root in found.tolist() if root != FREE and atoms.must_stay(root) is None]
    dead = np.zeros(found.max() + 2, np.bool_)  # the last entry answers FREE
    for gone in itertools.product((False, True), repeat=min(len(loose), 9)):
        dead[loose[: len(gone)]] = gone
        yield [np.asarray(~dead[rows].any(axis=0)) for rows in canonical]


@st.composite
def histories(draw: st.DrawFn) -> tuple[Atoms, list[Indices], list[tuple[int, int]], list[tuple[int, list[int]]]]:
    """Random statements about dimensions of four or six indices: `equal` pairs, and what is the `product` of what."""
    atoms = Atoms()
    size = draw(st.sampled_from([4, 6]))
    shape = (2, size // 2)
    dims: list[Indices] = [atoms.new(size), atoms.new(size)]
    equal: list[tuple[int, int]] = []
    products: list[tuple[int, list[int]]] = []
    steps = st.sampled_from(["new", "unite", "divide", "merge", "tie", "fix", "repeat", "permute"])
    for step in draw(st.lists(steps, min_size=1, max_size=6)):
        long = [i for i, dim in enumerate(dims) if dim.shape[1] == size]
        i, j = draw(st.sampled_from(long)), draw(st.sampled_from(long))
        if step == "new":
            dims.append(atoms.new(size))
        elif step == "unite":
            atoms.unite(dims[i], dims[j], WHY)
            equal.append((i, j))
        elif step == "divide":
            parts = atoms.divided(dims[i], shape, WHY)
            dims += parts
            products.append((i, [len(dims) - 2, len(dims) - 1]))
        elif step == "merge":
            outer, inner = atoms.new(shape[0]), atoms.new(shape[1])
            dims += [outer, inner, merged([outer, inner])]
            products.append((len(dims) - 1, [len(dims) - 3, len(dims) - 2]))
        elif step == "tie":
            atoms.tie(dims[i][:, :2], WHY)
        elif step == "fix":
            atoms.fix(dims[i][:, : draw(st.integers(1, size))], WHY)
        elif step == "repeat":
            dims.append(np.repeat(dims[i][:, : size // 2], 2, axis=1))
        else:
            dims.append(dims[i][:, draw(st.permutations(range(size)))])
    return atoms, dims, equal, products


@settings(max_examples=100, deadline=None)
@given(histories())
def test_whatever_goes_united_dimensions_live_at_the_same_indices(
    history: tuple[Atoms, list[Indices], list[tuple[int, int]], list[tuple[int, list[int]]]],
) -> None:
    atoms, dims, equal, products = history
    for alive in assignments(atoms, dims):
        for i, j in equal:
            assert alive[i].tolist() == alive[j].tolist()
        for whole, (outer, inner) in products:
            assert alive[whole].tolist() == (alive[outer][:, None] & alive[inner][None]).ravel().tolist()


@settings(max_examples=50, deadline=None)
@given(histories())
def test_roots_of_roots_are_roots(history: tuple[Atoms, list[Indices], object, object]) -> None:
    atoms, dims, *_ = history
    for dim in dims:
        once = atoms.roots(dim)
        assert atoms.roots(once).tolist() == once.tolist()
