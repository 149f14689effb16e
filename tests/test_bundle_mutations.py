"""A few of the 200 ways of `benchmarks/bundle_mutations.py` to spoil a bundle: refused by edgeprune and by run.py."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.bundle_mutations import by_itself
from benchmarks.bundle_spoiling import JSON, MUTATIONS, NAMES, spoiled, write_sealed
from edgeprune.bundle import MANIFEST, Contents, read_bundle, write_bundle
from edgeprune.bundle_core import Refused, check_name, parse_manifest
from edgeprune.device import load_device
from edgeprune.errors import InputError, TamperedError
from edgeprune.exporting import export, export_dense
from tests.small_models import Net, pruned, redrawn


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not measured; the null device's engine has the name of OpenVINO's, which the mutations look for."""
    scratch = tmp_path_factory.mktemp("bundle")
    device, given = load_device("null"), pruned(redrawn(Net()))
    contents = Contents(
        engine=export(given, device, scratch / "pruned"),
        dense=export_dense(redrawn(Net(16)), given.example_inputs, device, scratch / "dense"),
        model="tests.small_models:Net",
        preprocessing={"resize": 16, "crop": [16, 16]},
        command=("exec edgeprune export",),
    )
    return write_bundle(scratch / "net", contents).folder


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(48))
def test_a_spoiled_bundle_is_refused_with_a_message(whole: Path, tmp_path: Path, seed: int) -> None:
    folder, _, _ = spoiled(whole, tmp_path, seed)
    with pytest.raises((InputError, TamperedError)) as caught:
        read_bundle(folder)
    assert str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(len(MUTATIONS)))
def test_the_bundles_own_program_refuses_it_too(whole: Path, tmp_path: Path, seed: int) -> None:
    folder, _, _ = spoiled(whole, tmp_path, 100 + seed)
    assert by_itself(folder) is None


@pytest.mark.integration
def test_the_bundle_as_it_was_is_not_refused(whole: Path) -> None:
    """Negative control: without site-packages its own program ends for want of numpy, after all hashes."""
    found = by_itself(whole)
    assert found is not None and "'exit_code': 5" in found and "numpy" in found


@pytest.mark.unit
@pytest.mark.parametrize("how", sorted(JSON))
def test_json_that_two_readers_could_take_differently(whole: Path, tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "net")
    write_sealed(folder, JSON[how]((folder / MANIFEST).read_text()))
    with pytest.raises((InputError, TamperedError)):
        read_bundle(folder)


@pytest.mark.unit
def test_names_of_files_are_plain() -> None:
    for name in ("model.xml", "dense/model.bin", "plan.json", "a-b_c.2"):
        check_name("net", name)
    for name in NAMES:
        with pytest.raises(Refused):
            check_name("net", name)


@pytest.mark.unit
def test_what_a_strict_reader_of_json_says() -> None:
    assert parse_manifest(b'{"a": [1, 2.5, null, true, "\xc3\xa4"]}') == {"a": [1, 2.5, None, True, "ä"]}
    for text, words in (
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b"\xff", "utf-8"),
        (b'{"a": -Infinity}', "no number"),
    ):
        with pytest.raises(Refused, match=words):
            parse_manifest(text)


@pytest.mark.unit
def test_mutations_are_seeded(whole: Path, tmp_path: Path) -> None:
    for kind, mutate in MUTATIONS.items():
        said = []
        for turn in range(2):
            folder = shutil.copytree(whole, tmp_path / f"{kind}{turn}" / "net")
            said.append(mutate(random.Random(7), folder))
        assert said[0] == said[1]
