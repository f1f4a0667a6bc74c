"""Tiny random models of Stable Diffusion XL's kinds, built live in diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pairs import MAX_TOKENS, SD1_TEXT, TEXTS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from jaxdiff.data.tokens import Tokenizer

POOLED = 32
TEXT_2 = SD1_TEXT | {"hidden_size": 40, "num_hidden_layers": 4, "projection_dim": POOLED,
                     "hidden_act": "gelu", "num_attention_heads": 4}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def spiced(module: Any, seed: int) -> Any:
    """Moves what is born 0 or 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def unet(in_channels: int = 4, refiner: bool = False, **others: Any) -> UNet2DConditionModel:
    """A denoiser that reads sizes, two levels of it with attention of different depths."""
    numbers = 5 if refiner else 6
    values = {
        "sample_size": 16,
        "in_channels": in_channels,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 8 * numbers,
    }
    return spiced(UNet2DConditionModel(**values | others), 3)


def parts(
    folder: Path,
    scheduler: Any = None,
    texts: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    vae: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The networks of a pipeline with both text encoders; `texts` and `vae` are further values of their configs."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(TEXTS * 3, 560, MAX_TOKENS)
    tokenizer.save(folder / "made_tokenizer")
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "bos_token_id": tokenizer.bos_id,
              "eos_token_id": 2, "pad_token_id": tokenizer.eos_id}  # fmt: skip
    first, second = (CLIPTextConfig(**common | one | more) for one, more in zip((SD1_TEXT, TEXT_2), texts, strict=True))
    values = {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 32,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "scaling_factor": 0.13025,
        "norm_num_groups": 8,
    }  # fmt: skip
    refines = options.get("refiner", False)
    width = second.hidden_size if refines else first.hidden_size + second.hidden_size
    return {
        "vae": without_noise(spiced(AutoencoderKL(**values | (vae or {})), 5)),
        "text_encoder": spiced(CLIPTextModel(first), 6),
        "text_encoder_2": spiced(CLIPTextModelWithProjection(second), 7),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "made_tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "made_tokenizer", pad_token="!"),
        "unet": unet(**{"cross_attention_dim": width} | options),
        "scheduler": scheduler or EulerDiscreteScheduler(**SCHEDULE),
    }


def without_noise(vae: Any) -> Any:
    """The autoencoder with next to no variance, so that its samples are its most likely latents."""
    with torch.no_grad():
        half = vae.quant_conv.weight.shape[0] // 2
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -30
    return vae


def base(folder: Path, **values: Any) -> Any:
    """Stable Diffusion XL; the others are further values of its networks' configs."""
    networks = parts(folder, **values)
    return saved(StableDiffusionXLPipeline(**networks, add_watermarker=False), folder)


def refiner(folder: Path, **values: Any) -> Any:
    """The refiner; the others are further values of its networks' configs."""
    networks = parts(folder, refiner=True, **values) | {"text_encoder": None, "tokenizer": None}
    pipe = StableDiffusionXLImg2ImgPipeline(
        **networks, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False
    )
    return saved(pipe, folder)


def turbo(folder: Path) -> Any:
    """A model for a few steps without guidance."""
    scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    return saved(StableDiffusionXLPipeline(**parts(folder, scheduler), add_watermarker=False), folder)


def inpainting(folder: Path) -> Any:
    """A model that reads a mask and a masked image."""
    return saved(StableDiffusionXLInpaintPipeline(**parts(folder, in_channels=9), add_watermarker=False), folder)


def saved(pipe: Any, folder: Path) -> Any:
    """The pipeline, once it is saved."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    return pipe


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of 255 between our images and theirs in [0, 1], which must show something."""
    assert theirs.std() > 0.03
    return float(np.abs(ours - 255 * theirs).max())
