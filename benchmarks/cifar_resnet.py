"""ResNet-20 for CIFAR-10 with option-A shortcuts, by the names that widespread checkpoints have."""

from __future__ import annotations

import torch

PREPROCESSED = (1, 3, 32, 32)
"""One image, normalised by ImageNet's mean and standard deviation."""


class CifarResNet20(torch.nn.Module):
    """He et al. 2016 (arXiv:1512.03385), section 4.2, n = 3: three stages of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(3, 16, 1), torch.nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return torch.as_tensor(self.linear(x.mean((2, 3))))


class _Block(torch.nn.Module):
    """relu(f(x) + shortcut(x)); where the width doubles the shortcut takes every other pixel and pads channels."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(before, channels, stride), torch.nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _convolution(channels, channels, 1), torch.nn.BatchNorm2d(channels)
        self.padding = (channels - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + x)


def _stage(before: int, channels: int, stride: int) -> torch.nn.Sequential:
    first = _Block(before, channels, stride)
    return torch.nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(2)))


def _convolution(before: int, channels: int, stride: int) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(before, channels, 3, stride, 1, bias=False)
