"""24 architectures of transformers, built small from their configurations: 2 layers, width 64, 4 heads.

Every program takes tensors and gives a tensor or a flat tuple; no key-value cache, no dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

Built = tuple[torch.nn.Module, tuple[Tensor, ...]]

hf: Any = transformers  # the types of its configurations leave out what they inherit

ATTENTION = "sdpa"
EAGER = frozenset({"ConvNextForImageClassification", "MobileViTForImageClassification", "DetrForObjectDetection"})
"""They, or the backbone inside, take no other implementation of attention."""
EXPERTS = "batched_mm"  # of Mixtral: the eager one loops over the experts that were hit, which no exporter can trace
VOCABULARY = 128
TOKENS = 12
SIDE = 64
LABELS = 10


class Outputs(torch.nn.Module):
    """Calls a model with named tensors; gives the named outputs, one tensor or a flat tuple of them."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.input_names = inputs
        self.output_names = outputs
        self.fixed = fixed

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the model's outputs of these names hold."""
        answer = self.model(**dict(zip(self.input_names, inputs, strict=True)), **self.fixed)
        outputs = tuple(answer[name] for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs


def tokens(seed: int = 1, length: int = TOKENS) -> Tensor:
    """[1, length], int64; the first ids are left to the special tokens."""
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def pixels(side: int = SIDE) -> Tensor:
    """[1, 3, side, side], normal values."""
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def built(architecture: str, config: Any, inputs: dict[str, Tensor], *outputs: str, **fixed: Any) -> Built:
    """A model of that class with random weights, wrapped."""
    config._attn_implementation = "eager" if architecture in EAGER else ATTENTION
    model = getattr(hf, architecture)(config)
    return Outputs(model, tuple(inputs), outputs or ("logits",), **fixed), tuple(inputs.values())


ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_labels": LABELS,
}
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": LABELS,
}


def text_encoder(family: str) -> Built:
    """Sequence classification with BERT and its kin."""
    arguments = dict(ENCODER)
    if family == "Albert":
        arguments["embedding_size"] = 32
    if family == "DistilBert":
        renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        renamed["intermediate_size"] = "hidden_dim"
        arguments = {renamed.get(name, name): value for name, value in ENCODER.items()}
    config = getattr(hf, f"{family}Config")(**arguments)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(1, TOKENS, dtype=torch.int64)}
    return built(f"{family}ForSequenceClassification", config, inputs)


def decoder(family: str, **changes: Any) -> Built:
    """Next-token logits of a causal language model."""
    config = getattr(hf, f"{family}Config")(**{**DECODER, **changes})
    return built(f"{family}ForCausalLM", config, {"input_ids": tokens()}, use_cache=False)


def mixtral() -> Built:
    config = hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = EXPERTS
    return built("MixtralForCausalLM", config, {"input_ids": tokens()}, use_cache=False)


def gpt2() -> Built:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    return built("GPT2LMHeadModel", config, {"input_ids": tokens()}, use_cache=False)


def opt() -> Built:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    return built("OPTForCausalLM", config, {"input_ids": tokens()}, use_cache=False)


def t5() -> Built:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7)}
    return built("T5ForConditionalGeneration", config, inputs, use_cache=False)


def encoder_decoder_sizes() -> dict[str, Any]:
    """The arguments that BART and Whisper share."""
    sides = ("encoder", "decoder")
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 64, "use_cache": False}
    for side in sides:
        sizes.update({f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 128})
    return sizes


def bart() -> Built:
    config = hf.BartConfig(**encoder_decoder_sizes(), max_position_embeddings=64)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7)}
    return built("BartForConditionalGeneration", config, inputs, use_cache=False)


def whisper() -> Built:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        **encoder_decoder_sizes(), **special, num_mel_bins=20, max_source_positions=30, max_target_positions=16
    )
    sound = torch.randn(1, 20, 60, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": sound, "decoder_input_ids": tokens(2, 7)}
    return built("WhisperForConditionalGeneration", config, inputs, use_cache=False)


def vision_encoder(family: str) -> Built:
    """Image classification with ViT and its kin."""
    changes = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1} if family == "Beit" else {}
    config = getattr(hf, f"{family}Config")(**VISION, **changes)
    return built(f"{family}ForImageClassification", config, {"pixel_values": pixels()})


def swin() -> Built:
    config = hf.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=LABELS
    )
    return built("SwinForImageClassification", config, {"pixel_values": pixels()})


def convnext() -> Built:
    config = hf.ConvNextConfig(
        num_stages=3, depths=[2, 2, 2], hidden_sizes=[32, 64, 96], num_labels=LABELS, image_size=SIDE
    )
    return built("ConvNextForImageClassification", config, {"pixel_values": pixels()})


def mobilevit() -> Built:
    config = hf.MobileViTConfig(
        image_size=SIDE,
        hidden_sizes=[64, 80, 96],
        neck_hidden_sizes=[16, 32, 48, 64, 80, 96, 128],
        num_attention_heads=4,
        num_labels=LABELS,
    )
    return built("MobileViTForImageClassification", config, {"pixel_values": pixels()})


def segformer() -> Built:
    config = hf.SegformerConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=64,
        num_labels=LABELS,
    )
    return built("SegformerForSemanticSegmentation", config, {"pixel_values": pixels()})


def detr() -> Built:
    backbone = hf.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = hf.DetrConfig(
        **{name: size for name, size in encoder_decoder_sizes().items() if name not in ("vocab_size", "use_cache")},
        backbone_config=backbone,
        num_queries=8,
        num_labels=LABELS,
    )
    inputs = {"pixel_values": pixels(96), "pixel_mask": torch.ones(1, 96, 96, dtype=torch.int64)}
    return built("DetrForObjectDetection", config, inputs, "logits", "pred_boxes")


def clip() -> Built:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.CLIPConfig(
        text_config={**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 16},
        projection_dim=48,
    )
    inputs = {"input_ids": torch.cat([tokens(), tokens(2)]), "pixel_values": pixels()}
    return built("CLIPModel", config, inputs, "logits_per_image", "text_embeds", "image_embeds")


ENTRIES: dict[str, Callable[[], Built]] = {
    "hf:bert": lambda: text_encoder("Bert"),
    "hf:distilbert": lambda: text_encoder("DistilBert"),
    "hf:roberta": lambda: text_encoder("Roberta"),
    "hf:albert": lambda: text_encoder("Albert"),  # the layers share their parameters
    "hf:t5": t5,
    "hf:bart": bart,
    "hf:gpt2": gpt2,
    "hf:opt": opt,
    "hf:llama": lambda: decoder("Llama"),
    "hf:mistral": lambda: decoder("Mistral", sliding_window=8),
    "hf:qwen2": lambda: decoder("Qwen2"),
    "hf:gemma": lambda: decoder("Gemma", head_dim=16),
    "hf:phi": lambda: decoder("Phi", num_key_value_heads=4),
    "hf:mixtral": mixtral,
    "hf:vit": lambda: vision_encoder("ViT"),
    "hf:deit": lambda: vision_encoder("DeiT"),
    "hf:swin": swin,
    "hf:beit": lambda: vision_encoder("Beit"),
    "hf:convnext": convnext,
    "hf:mobilevit": mobilevit,
    "hf:segformer": segformer,
    "hf:detr": detr,
    "hf:clip": clip,
    "hf:whisper": whisper,
}
