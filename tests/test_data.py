"""Folders, CSV, npz and loaders as samples; bad pictures; the split; preprocessing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.data import Data, as_data, load_data, synthetic
from edgeprune.errors import InputError
from edgeprune.preprocessing import IMAGENET_MEAN, Preprocessing, decode_picture, default_preprocessing

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.unit

SHAPE = (1, 3, 8, 8)
PLAIN = Preprocessing(resize=8, crop=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


def picture(path: Path, colour: object = (255, 0, 0), size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        picture(tmp_path / "pictures" / f"{i}.png", (i * 20, 0, 0))
    return tmp_path / "pictures"


def everything(data: Data, **options: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    batches = list(data.batches(3, **options))
    labels = [y for _, y in batches if y is not None]
    return torch.cat([x for x, _ in batches]), torch.cat(labels) if labels else None


def test_a_folder_without_class_folders(folder: Path) -> None:
    data = load_data(str(folder), PLAIN, SHAPE)
    x, y = everything(data)
    assert (len(data), data.labels, y, x.shape, x.dtype) == (10, None, None, (10, 3, 8, 8), torch.float32)
    assert sorted((x[:, 0, 0, 0] * 255).round().int().tolist()) == [i * 20 for i in range(10)]
    assert torch.equal(x, everything(data)[0])
    assert len(everything(data, limit=4)[0]) == 4


def test_class_folders_by_order_or_by_number(tmp_path: Path) -> None:
    for name in ("a/dog/1.png", "a/cat/2.png", "a/cat/deep/3.png", "b/17/1.png", "b/3/2.png"):
        picture(tmp_path / name)
    by_order, by_number = (load_data(str(tmp_path / name), PLAIN, SHAPE) for name in "ab")
    assert dict(zip(by_order.names, by_order.labels or (), strict=True)) == {
        "cat/2.png": 0,
        "cat/deep/3.png": 0,
        "dog/1.png": 1,
    }
    assert dict(zip(by_number.names, by_number.labels or (), strict=True)) == {"17/1.png": 17, "3/2.png": 3}
    picture(tmp_path / "a" / "stray.png")
    with pytest.raises(InputError, match="both pictures and folders"):
        load_data(str(tmp_path / "a"), PLAIN, SHAPE)


@pytest.mark.parametrize("header", ["path,label\n", "\ufeffPath, Label\n", ""])
def test_csv_paths_are_relative_to_the_file(folder: Path, header: str) -> None:
    file = folder.parent / "list.csv"
    file.write_text(header + "pictures/3.png,7\n\npictures/4.png, 2\n", encoding="utf-8")
    data = load_data(str(file), PLAIN, SHAPE)
    assert data.names == ("pictures/3.png", "pictures/4.png") and data.labels == (7, 2)


def test_csv_without_labels_and_csv_faults(folder: Path) -> None:
    file = folder.parent / "list.csv"
    file.write_text("path\npictures/3.png\n")
    assert load_data(str(file), PLAIN, SHAPE).labels is None
    for text, place in [
        ("pictures/1.png,cat\n", "1: label 'cat'"),
        ("a,1\nb\n", "2: 1 columns"),
        ("a,1,2\n", "1: 3 col"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=f"list.csv:{place}"):
            load_data(str(file), PLAIN, SHAPE)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a CSV file"):
        load_data(str(file), PLAIN, SHAPE)


def test_what_is_no_picture_is_named_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden").write_text("hello")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # its header is fine: found out when decoded
    data = load_data(str(folder), PLAIN, SHAPE)
    assert data.skipped == ["notes.txt: not a readable picture"] and "notes.txt" in caplog.text
    assert len(everything(data, views=2)[0]) == 20
    assert data.skipped == ["notes.txt: not a readable picture", "cut.jpg: not a readable picture"]
    assert data.describe() == "11 unlabelled samples, 2 skipped"
    csv = folder.parent / "list.csv"
    csv.write_text("pictures/1.png,0\npictures/gone.png,1\n")
    assert load_data(str(csv), PLAIN, SHAPE).skipped == ["pictures/gone.png: no such file"]


def test_only_bad_pictures_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture in it"):
        load_data(str(tmp_path / "empty"), PLAIN, SHAPE)
    (tmp_path / "empty" / "a.png").write_text("no")
    with pytest.raises(InputError, match=r"no picture in it: a\.png: not a readable picture"):
        load_data(str(tmp_path / "empty"), PLAIN, SHAPE)


def test_upright_and_in_colour(tmp_path: Path) -> None:
    wide = Image.new("RGB", (20, 10), "red")
    exif = wide.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_picture(tmp_path / "turned.jpg", 3).size == (10, 20)
    for name, mode, colour, expected in [
        ("grey.png", "L", 100, (100, 100, 100)),
        ("clear.png", "RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("deep.png", "I;16", 100 << 8, (100, 100, 100)),
        ("ink.tiff", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("palette.png", "P", 0, (0, 0, 0)),
    ]:
        picture(tmp_path / name, colour, mode=mode)
        decoded = decode_picture(tmp_path / name, 3)
        assert (decoded.mode, decoded.getpixel((0, 0))) == ("RGB", expected), name
    assert decode_picture(tmp_path / "turned.jpg", 1).mode == "L"


def test_views_are_seeded_and_do_not_depend_on_the_batch(folder: Path) -> None:
    for i in range(10):
        noise = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    data = load_data(str(folder), PLAIN, SHAPE)
    x, _ = everything(data, views=3, seed=1)
    again = torch.cat([b for b, _ in data.batches(7, views=3, seed=1)])
    other, _ = everything(data, views=3, seed=2)
    assert x.shape[0] == 30 and torch.equal(x, again)
    assert torch.equal(x[:10], other[:10]) and not torch.equal(x[10:], other[10:])
    assert not torch.equal(x[10:20], x[20:])
    part = data.select([name in ("3.png", "5.png") for name in data.names])
    for sample in everything(part, views=3, seed=1)[0]:
        assert any(torch.equal(sample, other_sample) for other_sample in x)


def test_the_split_depends_on_names_alone(folder: Path) -> None:
    data = load_data(str(folder), PLAIN, SHAPE)
    calibration, report = data.split_by_hash()
    assert set(calibration.names) | set(report.names) == set(data.names)
    assert len(calibration) + len(report) == 10 and len(calibration) and len(report)
    fewer = data.select([name not in ("0.png", "7.png") for name in data.names])
    assert set(fewer.split_by_hash()[0].names) <= set(calibration.names)
    backwards = Data(names=data.names[::-1], labels=None, read=data.read, items=data.items[::-1])
    assert set(backwards.split_by_hash()[0].names) == set(calibration.names)


@pytest.mark.parametrize("names", [("a/same.png", "b/same.png", "c/same.png"), ("1", "2"), ("0", "9")])
def test_no_half_is_ever_empty(names: tuple[str, ...]) -> None:
    data = Data(names=names, labels=None, read=lambda *_: None, items=tuple(range(len(names))))
    assert min(map(len, data.split_by_hash())) >= 1


def test_a_quarter_is_held_out() -> None:
    for count, held in ((1, 0), (2, 1), (9, 2), (100, 25)):
        first, rest = synthetic(SHAPE, count=count).hold_out()
        assert len(first) == held and not set(first.names) & set(rest.names) and len(rest) == count - held


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(InputError, match="at least 2"):
        synthetic(SHAPE, count=1).split_by_hash()


def test_npz_floats_as_they_are_and_bytes_normalised(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    floats = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    np.savez(file, x=floats, y=np.array([4, 0, 1, 1, 2]))
    data = load_data(str(file), PLAIN, SHAPE)
    assert data.labels == (4, 0, 1, 1, 2)
    x, y = everything(data)
    assert y is not None and torch.equal(x, torch.from_numpy(floats[data.order]))
    assert y.tolist() == [(data.labels or ())[i] for i in data.order]
    np.savez(file, x=np.full((2, 8, 8, 3), 51, np.uint8))  # channels last
    assert torch.allclose(everything(load_data(str(file), PLAIN, SHAPE))[0], torch.tensor(0.2))
    np.savez(file, x=np.full((2, 8, 8), 51, np.uint8))  # grey without its dimension
    assert everything(load_data(str(file), None, (1, 1, 8, 8)))[0].shape == (2, 1, 8, 8)


def test_a_model_that_takes_integers_gets_them(tmp_path: Path) -> None:
    file = tmp_path / "ids.npz"
    ids = np.random.default_rng(0).integers(0, 30_000, (5, 16))
    for kept in (ids, ids.astype(np.int32), ids.astype(np.float64)):
        np.savez(file, x=kept)
        data = load_data(str(file), None, (1, 16), torch.int64)
        x, _ = everything(data)
        assert x.dtype == torch.int64 and torch.equal(x, torch.from_numpy(ids[data.order]))
    np.savez(file, x=(ids % 200).astype(np.uint8))
    assert everything(load_data(str(file), PLAIN, (1, 16), torch.int32))[0].dtype == torch.int32
    assert everything(load_data(str(file), None, (1, 16)))[0].dtype == torch.float32
    assert everything(as_data([torch.from_numpy(ids)]))[0].dtype == torch.int64
    assert everything(as_data([torch.from_numpy(ids)], dtype=torch.float32))[0].dtype == torch.float32


def test_what_is_no_integer_of_that_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ids.npz"
    np.savez(file, x=np.full((2, 4), 0.5))
    with pytest.raises(InputError, match=r"ids.npz: x is float64 with fractions, the model takes int64"):
        load_data(str(file), None, (1, 4), torch.int64)
    for wrong, message in ((np.nan, "values that are no numbers"), (2.0**63, "goes from 9.22")):
        np.savez(file, x=np.full((2, 4), wrong))
        with pytest.raises(InputError, match=message):
            load_data(str(file), None, (1, 4), torch.int64)
    with pytest.raises(InputError, match="the model takes uint8, pictures are made float32"):
        load_data(str(tmp_path), PLAIN, SHAPE, torch.uint8)
    np.savez(file, x=np.full((2, 4), 2**40))
    with pytest.raises(InputError, match=r"x goes from 1099511627776 to 1099511627776, more than the int32"):
        load_data(str(file), None, (1, 4), torch.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "expected arrays x and, with labels, y; found a"),
        ({"x": np.zeros((2, 3, 9, 9))}, r"expected numbers of shape \(N, 3, 8, 8\)"),
        ({"x": np.zeros((2, 3, 8, 8)), "y": np.zeros(3, int)}, "expected 2 class numbers"),
        ({"x": np.zeros((2, 3, 8, 8)), "y": np.array([0, -1])}, "expected 2 class numbers"),
        ({"x": np.array(["a", "b"])}, "expected numbers"),
    ],
)
def test_faulty_npz(
    tmp_path: Path, arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"data.npz: .*{message}"):
        load_data(str(tmp_path / "data.npz"), PLAIN, SHAPE)


def test_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not an npz file of arrays"):
        load_data(str(tmp_path / "data.npz"), PLAIN, SHAPE)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not an npz file of arrays"):
        load_data(str(tmp_path / "text.npz"), PLAIN, SHAPE)


def test_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data.py").write_text(
        "import torch\n"
        "def pairs():\n    for i in range(3): yield torch.full((2, 3, 8, 8), i), torch.tensor([i, i])\n"
        "def plain(): return [torch.ones(2, 3, 8, 8)]\n"
        "def mixed(): return [torch.ones(2, 3, 8, 8), (torch.ones(2, 3, 8, 8), torch.ones(2).long())]\n"
        "def empty(): return []\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data("my_data:pairs", None, SHAPE)
    assert data.labels == (0, 0, 1, 1, 2, 2)
    assert load_data("my_data:plain", None, SHAPE).labels is None
    for name, message in [("mixed", "some batches only"), ("empty", "is empty"), ("number", "gives a int")]:
        with pytest.raises(InputError, match=message):
            load_data(f"my_data:{name}", None, SHAPE)


def test_as_data_takes_what_is_there() -> None:
    data = synthetic(SHAPE, count=3)
    assert as_data(data) is data
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 3, 8, 8), torch.arange(5)), 2)
    assert as_data(loader).labels == (0, 1, 2, 3, 4)

    def ragged() -> Iterator[torch.Tensor]:
        yield torch.ones(1, 3)
        yield torch.ones(1, 4)

    with pytest.raises(InputError, match="don't fit together"):
        as_data(ragged())


def test_synthetic_samples_are_marked_and_seeded() -> None:
    first, other = everything(synthetic(SHAPE, seed=1, count=4))[0], everything(synthetic(SHAPE, seed=2, count=4))[0]
    assert first.shape == (4, 3, 8, 8) and synthetic(SHAPE).is_synthetic
    assert torch.equal(first, everything(synthetic(SHAPE, seed=1, count=4))[0]) and not torch.equal(first, other)
    assert synthetic(SHAPE).calibration_views() == (256, 8)
    assert synthetic((1, 3, 224, 224)).calibration_views() == (64, 2)


@pytest.mark.parametrize(
    ("spec", "message"), [("nowhere", "no such file or folder"), ("no_such:loader", "no module 'no_such'")]
)
def test_data_that_is_not_there(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(spec, PLAIN, SHAPE)


def test_data_of_another_kind_or_size(folder: Path) -> None:
    with pytest.raises(InputError, match="expected a folder of pictures"):
        load_data(str(folder / "1.png"), PLAIN, SHAPE)
    with pytest.raises(InputError, match=r"gives 3 x 8 x 8, the model's input is 3 x 9 x 9"):
        load_data(str(folder), PLAIN, (1, 3, 9, 9))
    with pytest.raises(InputError, match="is no picture"):
        load_data(str(folder), None, (1, 128))


def test_the_crop_is_torchvisions(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    noise = np.random.default_rng(0).integers(0, 255, (300, 411, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    preset = models.MobileNet_V2_Weights.IMAGENET1K_V2.transforms()
    own = default_preprocessing("torchvision:mobilenet_v2", (1, 3, 224, 224))
    assert own is not None and own.resize == 232
    x, _ = everything(load_data(str(tmp_path), own, (1, 3, 224, 224)))
    assert torch.allclose(x[0], preset(Image.open(tmp_path / "a.png")), atol=1e-5)


def test_defaults_come_from_the_model() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    square = (1, 3, 224, 224)
    v1 = default_preprocessing("torchvision:mobilenet_v2", square, weights="w/mobilenet_v2-b0353104.pth")
    assert v1 is not None and v1.resize == 256
    inception = default_preprocessing("timm:inception_v3", (1, 3, 299, 299))
    assert inception is not None and inception.interpolation == "bicubic" and inception.resize == round(299 / 0.875)
    small = default_preprocessing("pkg:net", (1, 3, 32, 48))
    assert small is not None and small.crop == (32, 48) and small.resize == 37 and small.mean == IMAGENET_MEAN
    grey = default_preprocessing("pkg:net", (1, 1, 28, 28))
    assert grey is not None and grey.shape == (1, 28, 28)
    assert default_preprocessing("pkg:net", (1, 128)) is None
    assert default_preprocessing("pkg:net", (1, 4, 32, 32)) is None


def test_small_and_narrow_pictures_fill_the_crop(tmp_path: Path) -> None:
    for size in ((3, 2), (1, 200), (200, 1), (8, 8)):
        picture(tmp_path / f"{size[0]}x{size[1]}.png", size=size)
    preprocessing = Preprocessing(resize=10, crop=(8, 16))
    x, _ = everything(load_data(str(tmp_path), preprocessing, (1, 3, 8, 16)), views=3)
    assert x.shape == (12, 3, 8, 16)


def test_preprocessing_survives_its_file(tmp_path: Path) -> None:
    own = Preprocessing(resize=40, crop=(32, 36), mean=(0.1, 0.2, 0.3), interpolation="nearest")
    own.to_json(tmp_path / "p.json")
    assert Preprocessing.from_json(tmp_path / "p.json") == own


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"resize": 8, "crop": [8, 8], "means": [0]}, "unknown key 'means'; did you mean 'mean'"),
        ({"resize": 0, "crop": [8]}, "resize: .*; crop.1: "),
        ({"resize": 8, "crop": [8, 8], "mean": [0.5]}, "3 entries each"),
        ({"resize": 8, "crop": [8, 8], "std": [0, 1, 1]}, "std.0: "),
        ([1], "expected an object"),
        (None, "not a JSON file"),
    ],
)
def test_faulty_preprocessing(tmp_path: Path, document: object, message: str) -> None:
    file = tmp_path / "p.json"
    file.write_text("{" if document is None else json.dumps(document))
    with pytest.raises(InputError, match=f"p.json: .*{message}"):
        Preprocessing.from_json(file)
