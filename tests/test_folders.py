from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edgeprune import folders
from edgeprune.errors import StorageError

pytestmark = pytest.mark.unit


def test_environment_names_the_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEPRUNE_CONFIG_DIR", "")
    assert folders.cache_dir() == tmp_path / "cache"
    assert folders.config_dir().name == "edgeprune"


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    folders.write_atomically(path, "old")
    folders.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/plan.json: (Not a directory|File exists)"):
        folders.write_atomically(tmp_path / "file" / "plan.json", "x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        folders.write_atomically(tmp_path / "taken", "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken"]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for content in ("old", "new"):
        with folders.atomic_folder(path) as folder:
            (folder / content).write_text(content)
            assert folder.parent == path.parent
            assert not (path / content).exists()
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "gone")])
def test_a_fault_inside_leaves_the_old_folder(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(type(fault)), folders.atomic_folder(path) as folder:
        (folder / "half").write_text("")
        raise fault
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    expected = rf"cannot write {tmp_path / 'bundle'}: No space left on device"
    with pytest.raises(StorageError, match=expected), folders.atomic_folder(tmp_path / "bundle"):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with folders.atomic_folder(tmp_path / "out") as folder:
        (folder / "engine").write_text("")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "engine").exists()
