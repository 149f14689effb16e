"""The networks that predictions are tried on, with random weights: latency does not depend on them."""

from __future__ import annotations

import warnings

import torch

FIRST_SEED = 1000
"""Of the random widths, unless told."""
RANDOM = 12
"""Random choices of widths of each network, with seeds that count from the first."""
NETWORKS = (
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "regnet_y_400mf",
    "squeezenet1_1",
    "cifar_resnet56",
    "vit_small_patch16_224",
)


def build(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network in evaluation mode and its example input: one image of 224 pixels, CIFAR's of 32."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "cifar_resnet56":
            return CifarResNet(9).eval(), (torch.randn(1, 3, 32, 32),)
        if name.startswith("vit_"):
            import timm

            return timm.create_model(name).eval(), (torch.randn(1, 3, 224, 224),)
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval(), (torch.randn(1, 3, 224, 224),)


class CifarResNet(torch.nn.Module):
    """He et al. 2016 (arXiv:1512.03385), section 4.2: 6n + 2 layers of 16, 32 and 64 channels.

    With 1x1 convolutions on the two shortcuts that change width (option B), which can be pruned.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        before = 16
        for channels in (16, 32, 64):
            for i in range(n):
                layers.append(_Basic(before, channels, stride=2 if i == 0 and channels > 16 else 1))
                before = channels
        self.stem = _convolution(3, 16, 3, 1)
        self.layers = torch.nn.Sequential(*layers)
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        return torch.as_tensor(self.fc(self.layers(self.stem(x).relu()).mean((2, 3))))


class _Basic(torch.nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, channels, 3, stride)
        self.second = _convolution(channels, channels, 3, 1)
        self.shortcut = _convolution(before, channels, 1, stride) if stride > 1 else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x).relu()) + self.shortcut(x))


def _convolution(before: int, channels: int, window: int, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(before, channels, window, stride, window // 2, bias=False), torch.nn.BatchNorm2d(channels)
    )
