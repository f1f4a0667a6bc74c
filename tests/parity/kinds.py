"""Tiny random models of Stable Diffusion's further kinds, built live in diffusers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pairs import MAX_TOKENS, SD1_TEXT, SD1_UNET, TEXTS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from xl import SCHEDULE, spiced, without_noise

from jaxdiff.data.tokens import Tokenizer


def parts(folder: Path, scheduler: Any = None, vae: dict[str, Any] | None = None, **unet: Any) -> dict[str, Any]:
    """The networks of a pipeline; `vae` and `unet` are further values of their configs."""
    torch.set_num_threads(1)
    torch.manual_seed(2)
    tokenizer = Tokenizer.train(TEXTS * 3, 560, MAX_TOKENS)
    tokenizer.save(folder / "made_tokenizer")
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id, "projection_dim": 16}  # fmt: skip
    first_stage = {"block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 32,
                   "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
                   "norm_num_groups": 8}  # fmt: skip
    return {
        "vae": without_noise(spiced(AutoencoderKL(**first_stage | (vae or {})), 5)),
        "text_encoder": spiced(CLIPTextModel(CLIPTextConfig(**text | SD1_TEXT)), 6),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "made_tokenizer"),
        "unet": spiced(UNet2DConditionModel(**SD1_UNET | unet), 7),
        "scheduler": scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
    }


SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
