"""Every torchvision builder that takes random weights: small inputs, 20 classes.

The program of a detection model is backbone and heads on an image that the transform has normalised already, up to
before top-k and NMS. Regions of interest are constants, one for each level of the feature pyramid.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor

Built = tuple[torch.nn.Module, tuple[Tensor, ...]]

NUM_CLASSES = 20
SIDE = int(os.environ.get("COVERAGE_SIDE", "64"))
"""Pixels along each side of the image, where nothing below says otherwise."""
SIDES = {
    "inception_v3": 96,  # its auxiliary-free trunk reduces 75 pixels to one
    "efficientnet_b6": 128,  # re-drawn they are chaotic on smaller maps
    "efficientnet_b7": 128,
    "efficientnet_v2_l": 128,
    "maxvit_t": 224,  # every stage must divide by the partition of 7
    "vit_h_14": 56,
    "ssd300_vgg16": 300,  # the extra layers have no padding
    "ssdlite320_mobilenet_v3_large": 160,
}
DETECTION_SIDE = 128
CLIPS = {
    "mvit_v1_b": (16, 224),  # the builders fix the size of the position embedding
    "mvit_v2_s": (16, 224),
    "s3d": (16, 224),  # its last pooling takes 2 frames of 7 x 7
}
"""Frames and pixels of a clip; 8 and 64 where nothing is said."""
FLOW_UPDATES = 2


class MainOutput(torch.nn.Module):
    """The entry `out` of a segmentation model's dictionary."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, classes, H, W]."""
        out: Tensor = self.model(x)["out"]
        return out


class OneStage(torch.nn.Module):
    """Backbone and head of RetinaNet, FCOS, SSD: class logits, box regression (and centre-ness) of all anchors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] to tensors of [N, anchors, *]."""
        return tuple(self.head(list(self.backbone(x).values())).values())


class TwoStage(torch.nn.Module):
    """Backbone, region proposal head and the heads on regions of Faster, Mask and Keypoint R-CNN."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.proposal_head = model.rpn.head
        self.roi_heads = model.roi_heads

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] to objectness and deltas of every level, class logits, boxes (masks, keypoints)."""
        features = self.backbone(x)
        objectness, deltas = self.proposal_head(list(features.values()))
        heads = self.roi_heads
        levels = [features[name] for name in heads.box_roi_pool.featmap_names if name in features]
        outputs = [*objectness, *deltas, *heads.box_predictor(heads.box_head(regions(levels, 7)))]
        if heads.has_mask():
            outputs.append(heads.mask_predictor(heads.mask_head(regions(levels, 14))))
        if heads.has_keypoint():
            outputs.append(heads.keypoint_predictor(heads.keypoint_head(regions(levels, 14))))
        return tuple(outputs)


def regions(levels: list[Tensor], size: int) -> Tensor:
    """One region of interest from each level of the first image, [levels, C, size, size]."""
    box = levels[0].new_tensor([[0.0, 0.1, 0.2, 0.8, 0.9]])
    scale = [box.new_tensor([1, *level.shape[:1:-1], *level.shape[:1:-1]]) for level in levels]
    pooled = [torchvision.ops.roi_align(f, box * s, size, 1.0, 2) for f, s in zip(levels, scale, strict=True)]
    return torch.cat(pooled)


class Flow(torch.nn.Module):
    """RAFT with two updates instead of twelve; the predicted flows, coarse to fine."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Two images [N, 3, H, W] to flows [N, 2, H, W]."""
        return tuple(self.model(first, second, num_flow_updates=FLOW_UPDATES))


def image(side: int, frames: tuple[int, ...] = ()) -> Tensor:
    """[1, 3, *frames, side, side], normal values."""
    return torch.randn(1, 3, *frames, side, side, generator=torch.Generator().manual_seed(1))


def classification(name: str) -> Built:
    side = SIDES.get(name, SIDE)
    arguments: dict[str, Any] = {}
    if name.startswith("vit_"):
        arguments["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        arguments.update(aux_logits=False, init_weights=False)
    return torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES, **arguments), (image(side),)


def segmentation(name: str) -> Built:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    return MainOutput(model), (image(SIDE),)


def detection(name: str) -> Built:
    classes = {} if name.startswith("keypoint") else {"num_classes": NUM_CLASSES}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **classes)
    wrapped = TwoStage(model) if hasattr(model, "roi_heads") else OneStage(model)
    return wrapped, (image(SIDES.get(name, DETECTION_SIDE)),)


def video(name: str) -> Built:
    frames, side = CLIPS.get(name, (8, SIDE))
    return torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES), (image(side, (frames,)),)


def optical_flow(name: str) -> Built:
    second = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    return Flow(torchvision.models.get_model(name, weights=None)), (image(128), second)


ENTRIES: dict[str, Callable[[], Built]] = {
    f"torchvision:{name}": partial(builder, name)
    for module, builder in (
        (torchvision.models, classification),
        (torchvision.models.segmentation, segmentation),
        (torchvision.models.detection, detection),
        (torchvision.models.video, video),
        (torchvision.models.optical_flow, optical_flow),
    )
    for name in torchvision.models.list_models(module=module)
}
