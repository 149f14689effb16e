"""Networks with real weights and real inputs for `benchmarks.two_of_four`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar import as_input, test_images, trained
from edgeprune.eligibility import GROUP

PICTURES, CIFAR_PICTURES, ROWS, TOKENS = 16, 48, 32, 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, what it is, its trace's inputs, and samples of which the first half is fitted to."""

    name: str
    what: str
    model: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    samples: torch.Tensor

    @property
    def sparse(self) -> tuple[str, ...]:
        """The weights that have a 2:4 form: ungrouped convolutions and linears of fours of inputs."""
        found = []
        for path, layer in self.model.named_modules():
            is_conv = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1
            if (is_conv or isinstance(layer, torch.nn.Linear)) and layer.weight.shape[1] % GROUP == 0:
                found.append(f"{path}.weight")
        return tuple(found)


def mobilenet(weights: Path, pictures: Path) -> Case:
    """torchvision's ImageNet weights, labelled ImageNet pictures that come with foolbox."""
    from PIL import Image
    from torchvision.models import mobilenet_v2
    from torchvision.transforms import v2

    model = mobilenet_v2()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    prepare = v2.Compose(
        [
            *(v2.Resize(184), v2.CenterCrop(160), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted(pictures.glob("imagenet_*.jpg"))[:PICTURES]
    samples = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    what = f"torchvision's ImageNet weights, {len(samples)} pictures of 160 pixels"
    return Case(name="MobileNetV2", what=what, model=model.eval(), example=(samples[:1],), samples=samples)


def resnet56(weights: Path, cifar: Path) -> Case:
    """Trained on CIFAR-10, pictures of its test part."""
    samples = as_input(test_images(cifar)[0][-CIFAR_PICTURES:])
    what = f"trained on CIFAR-10, {CIFAR_PICTURES} of its test pictures, others than those of the accuracy"
    return Case(name="ResNet-56", what=what, model=trained(weights), example=(samples[:1],), samples=samples)


def resnet50() -> Case:
    """torchvision's ResNet-50 with random weights: for its shape."""
    from torchvision.models import resnet50 as build

    torch.manual_seed(0)
    model = build()
    samples = torch.nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=32, mode="bilinear")
    what = "torchvision's, random weights, smooth random pictures of 32 pixels"
    return Case(name="ResNet-50", what=what, model=model.eval(), example=(samples[:1],), samples=samples)


class SentenceHead(torch.nn.Module):
    """Mean-pooled MiniLM with a linear head, random, of seven outputs: the residual stream is no output then."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(384, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, 7] of token ids [N, TOKENS]."""
        head: torch.Tensor = self.head(self.encoder(input_ids=ids).last_hidden_state.mean(1))
        return head


def minilm(folder: Path, sentences: Path) -> Case:
    """all-MiniLM-L6-v2; sentences laid end to end in rows of 32 tokens."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lines = sentences.read_text("utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))[:500]
    ids: list[int] = []
    for line in (lines[i] for i in order):
        ids += tokenizer.encode(max(line.split("\t"), key=len), add_special_tokens=False).ids
    samples = torch.tensor(ids[: ROWS * TOKENS]).reshape(ROWS, TOKENS)
    what = f"all-MiniLM-L6-v2 with a random head of 7, {ROWS} rows of {TOKENS} tokens of SNIPS sentences"
    model = SentenceHead(encoder).eval()
    return Case(name="MiniLM", what=what, model=model, example=(samples[:1],), samples=samples)
