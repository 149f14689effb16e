"""From a file of a picture to what a model reads; kept in the bundle, so that whoever runs the engine does the same.

Legend: C channels, H height, W width of the model's input.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import InputError, did_you_mean
from edgeprune.folders import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

CACHE_BYTES = 256 * 2**20  # of decoded pictures
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_RESIZE_SHARE = 256 / 224  # of the shorter side to the crop, the classic ImageNet evaluation

log = logging.getLogger(__name__)
_Positive = Annotated[int, Field(ge=1)]


class Preprocessing(BaseModel):
    """Resize the shorter side to `resize` pixels, cut `crop` (H, W) out of the middle, then (x · scale - mean) / std.

    x are the values 0..255 of the picture; `mean` and `std` have one entry a channel, three for RGB, one for grey. The
    result is float32 in the order of `layout`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: _Positive
    crop: tuple[_Positive, _Positive]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[Annotated[float, Field(gt=0)], ...] = IMAGENET_STD
    scale: Annotated[float, Field(gt=0)] = 1 / 255
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    layout: Literal["NCHW"] = "NCHW"

    @model_validator(mode="after")
    def _channels_agree(self) -> Preprocessing:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need 3 entries each (RGB) or 1 (grey), found {self.mean} and {self.std}")
        return self

    @property
    def num_channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return (self.num_channels, *self.crop)

    def to_json(self, path: Path) -> None:
        """Write it, as `--preprocess` reads it."""
        write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: Path) -> Preprocessing:
        """Read `--preprocess FILE.json`; `InputError` names every key that is wrong."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the preprocessing: {error.strerror}", file=path) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"not a JSON file: {error}", file=path) from None
        if not isinstance(document, dict):
            raise InputError(f"expected an object with {', '.join(cls.model_fields)}", file=path)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise InputError("; ".join(_fault(f) for f in error.errors(include_url=False)), file=path) from None

    def geometry(self, picture: Image) -> npt.NDArray[np.uint8]:
        """The picture resized and cropped: uint8 [H, W, C]. A picture smaller than the crop is enlarged to fill it."""
        height, width = self.crop
        shorter = min(picture.size)
        sides = [self.resize * side // shorter for side in picture.size]  # width, height; one of them is self.resize
        enlarge = max(1.0, width / sides[0], height / sides[1])
        sides = [max(least, round(side * enlarge)) for side, least in zip(sides, (width, height), strict=True)]
        resized = picture.resize((sides[0], sides[1]), self._filter())
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return pixels(resized.crop((left, top, left + width, top + height)))

    def random_geometry(self, picture: Image, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
        """A random part of 35 to 100 % of the area, sides 3:4 to 4:3, mirrored or not: uint8 [H, W, C]."""
        area = picture.width * picture.height * generator.uniform(0.35, 1.0)
        ratio = float(np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))) * self.crop[1] / self.crop[0]
        width = min(picture.width, max(1, round((area * ratio) ** 0.5)))
        height = min(picture.height, max(1, round((area / ratio) ** 0.5)))
        left = int(generator.integers(picture.width - width + 1))
        top = int(generator.integers(picture.height - height + 1))
        part = picture.resize(self.crop[::-1], self._filter(), box=(left, top, left + width, top + height))
        values = pixels(part)
        return np.ascontiguousarray(values[:, ::-1]) if generator.random() < 0.5 else values

    def normalise(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [N, H, W, C] to the model's float32 [N, C, H, W]."""
        scaled = values.astype(np.float32) * np.float32(self.scale)
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def _filter(self) -> Any:
        from PIL.Image import Resampling

        return Resampling[self.interpolation.upper()]


def _fault(fault: Mapping[str, Any]) -> str:
    key = ".".join(str(step) for step in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(key, Preprocessing.model_fields)}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}" if key else message


def pixels(picture: Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C]."""
    values = np.asarray(picture, np.uint8)
    return values[:, :, None] if values.ndim == 2 else values


def default_preprocessing(
    spec: str, shape: Sequence[int], *, weights: str | Path | None = None
) -> Preprocessing | None:
    """That of the model's own configuration, for an input of `shape` (N, C, H, W).

    torchvision: the transforms of the release whose file `weights` is called like, else of the builder's default
    release; timm: `pretrained_cfg`; anything else: ImageNet's. Another size keeps the share of resize to crop. None
    where the input is no picture (not 4-d, or neither 3 nor 1 channels).
    """
    if len(shape) != 4 or shape[1] not in (1, 3):
        return None
    crop = (int(shape[2]), int(shape[3]))
    if shape[1] == 1:
        return Preprocessing(resize=min(crop), crop=crop, mean=(0.5,), std=(0.5,))
    kind, _, name = spec.partition(":")
    file = Path(weights).name if weights is not None else ""
    found = {"torchvision": _of_torchvision, "timm": _of_timm}.get(kind, _imagenet)(name, file)
    share = found.pop("resize_share")
    if len(found.get("mean", IMAGENET_MEAN)) != 3:
        return None
    return Preprocessing(resize=max(1, round(min(crop) * share)), crop=crop, **found)


def _imagenet(name: str, file: str) -> dict[str, Any]:
    return {"resize_share": IMAGENET_RESIZE_SHARE}


def _of_torchvision(name: str, file: str) -> dict[str, Any]:
    from torchvision import models

    releases = models.get_model_weights(name)
    if not len(releases):
        return _imagenet(name, file)
    named = [release for release in releases if release.url.rpartition("/")[2] == file]
    preset = (named or [releases.DEFAULT])[0].transforms()
    if not hasattr(preset, "crop_size"):  # segmentation, detection
        return _imagenet(name, file)
    return {
        "resize_share": preset.resize_size[0] / preset.crop_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }


def _of_timm(name: str, file: str) -> dict[str, Any]:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return _imagenet(name, file)
    return {
        "resize_share": 1 / config.crop_pct,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "interpolation": config.interpolation if config.interpolation in ("nearest", "bilinear") else "bicubic",
    }


class Decoder:
    """Decodes pictures; the latest `CACHE_BYTES` of them stay decoded."""

    def __init__(self, folder: Path, names: tuple[str, ...], skipped: list[str]) -> None:
        self.folder, self.names, self.skipped = folder, names, skipped
        self.cache: OrderedDict[int, Image] = OrderedDict()
        self.broken: set[int] = set()
        self.num_bytes = 0

    def __call__(self, item: int, num_channels: int) -> Image | None:
        if item in self.broken:
            return None
        if item in self.cache:
            self.cache.move_to_end(item)
            return self.cache[item]
        try:
            picture = decode_picture(self.folder / self.names[item], num_channels)
        except Exception as error:  # decoders raise many kinds on a broken file
            self.broken.add(item)
            skip(self.skipped, self.names[item], error)
            return None
        self.cache[item] = picture
        self.num_bytes += picture.width * picture.height * num_channels
        while self.num_bytes > CACHE_BYTES and len(self.cache) > 1:
            _, oldest = self.cache.popitem(last=False)
            self.num_bytes -= oldest.width * oldest.height * num_channels
        return picture


def open_picture(path: Path) -> Image:
    from PIL import Image

    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from None


def decode_picture(path: Path, num_channels: int) -> Image:
    """The picture upright (EXIF) in RGB (3 channels) or grey (1); what is transparent becomes white."""
    from PIL import Image, ImageOps

    with open_picture(path) as file:
        picture = ImageOps.exif_transpose(file)
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        elif picture.mode.startswith("I") or picture.mode == "F":
            picture = _to_8_bits(picture)
        return picture.convert("RGB" if num_channels == 3 else "L")


def _to_8_bits(picture: Image) -> Image:
    """16-bit grey, which `convert` would clip at 255, by its upper 8 bits; floats are taken as 0..255."""
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode != "F" and values.max() > 255:
        values = values >> 8
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def skip(skipped: list[str], name: str, error: Exception) -> None:
    """Note, and say, that a picture is left out."""
    reason = "no such file" if isinstance(error, FileNotFoundError) else "not a readable picture"
    skipped.append(f"{name}: {reason}")
    log.warning("skipped %s: %s", name, reason)
