"""One model of every model file of timm 1.0.31: the smallest by parameters (its test models aside), 10 classes.

Sides are the smallest of 64, 96, 112, ... 224 pixels that the model takes without losing its window structure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

Built = tuple[torch.nn.Module, tuple[Tensor, ...]]

NUM_CLASSES = 10
MODELS: dict[str, tuple[str, int] | tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 96, {"img_size": 96}),
    "byoanet": ("eca_botnext26ts_256", 64, {"img_size": 64}),
    "byobnet": ("mobileone_s1", 64),
    "cait": ("cait_xxs24_224", 96, {"img_size": 96}),
    "coat": ("coat_tiny", 96, {"img_size": 96}),
    "convit": ("convit_tiny", 96, {"img_size": 96}),
    "convmixer": ("convmixer_768_32", 64),
    "convnext": ("convnext_atto_rms", 64),
    "cpubone": ("cpubone_nano", 64),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "davit": ("davit_tiny", 96),
    "deepseek_vit": ("deepseek_vit_412m", 112),
    "deit": ("deit_tiny_patch16_224", 96, {"img_size": 96}),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("mobilenetv2_035", 64),
    "efficientvim": ("efficientvim_m1", 128),
    "efficientvit_mit": ("efficientvit_b0", 96),
    "efficientvit_msra": ("efficientvit_m0", 96, {"img_size": 96}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 96, {"img_size": 96}),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 96),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 96, {"img_size": 96}),
    "gemma4_vit": ("gemma4_vit_167m", 96),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
    "hieradet_sam2": ("sam2_hiera_tiny", 64),
    "hrnet": ("hrnet_w18_small", 96),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 96),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 96, {"img_size": 96}),
    "lowformer": ("lowformer_b0", 64),
    "mambaout": ("mambaout_femto", 64),
    "maxxvit": ("maxvit_pico_rw_256", 96, {"img_size": 96}),
    "metaformer": ("poolformerv2_s12", 64),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", 64),
    "mobilenetv5": ("mobilenetv5_300m", 64),
    "mobilevit": ("mobilevit_xxs", 96),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 96),
    "nasnet": ("nasnetalarge", 64),
    "nest": ("nest_tiny", 96, {"img_size": 96}),
    "nextvit": ("nextvit_small", 96),
    "nfnet": ("nf_regnet_b0", 64),
    "pit": ("pit_ti_224", 96, {"img_size": 96}),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "qwen3_vit": ("qwen3_vit_88m", 96),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 96),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("resnet10t", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 64, {"img_size": 64}),
    "shvit": ("shvit_s1", 96),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64, {"img_size": 64}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 96, {"img_size": 96}),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 96, {"img_size": 96}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 96, {"img_size": 96}),
    "tiny_vit": ("tiny_vit_5m_224", 96),
    "tnt": ("tnt_s_legacy_patch16_224", 96, {"img_size": 96}),
    "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 96, {"img_size": 96}),
    "vgg": ("vgg11", 64),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("vit_tiny_patch16_224", 96, {"img_size": 96}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 96, {"img_size": 96}),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 96, {"img_size": 96}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 96, {"img_size": 96}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 96, {"img_size": 96}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 96, {"img_size": 96}),
}
"""Model file to model name, pixels along a side, arguments that the size needs."""


def model_of(file: str) -> Built:
    """The file's model with random weights and one image, [1, 3, side, side]."""
    name, side, *arguments = MODELS[file]
    model = timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **(arguments[0] if arguments else {}))
    return model, (torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1)),)


ENTRIES: dict[str, Callable[[], Built]] = {f"timm:{file}": partial(model_of, file) for file in MODELS}
