"""The small models that tests share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff import build
from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    DiffusionTask,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
    to_dict,
)
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.families import StableDiffusion, StableDiffusionXL
from jaxdiff.io.convert import torch_views
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.model import Model, Network
from jaxdiff.types import Params

UNET = UNetConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
VAE = VAEConfig(
    sample_size=16,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.5,
)
TEXT_ENCODER = CLIPTextConfig(
    vocab_size=600,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
)
IMAGE_ENCODER = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    projection_dim=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
CONFIGS: dict[str, Any] = {"denoiser": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
"""A model of 16x16 pixels, by role."""
SCHEDULER = SchedulerConfig(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
    prediction_type="v_prediction",
)


def random_params(name: str, config: Any, rng: np.random.Generator) -> Params:
    """Params drawn by NumPy; to compile the networks' own initialisation takes longer than the tests.

    Args:
        name: "unet", "vae" or "text_encoder".
        config: the network's.
        rng: draws them.
    """

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "bias"):
            return np.full(leaf.shape, float(path[-1].key == "scale"), np.float32)
        # A fresh text encoder says nearly the same of every prompt; large embeddings make prompts differ.
        spread = 1.0 if path[-1].key == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
        return (spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, build.param_shapes(getattr(build, name)(config), config))


def tokenizer() -> Tokenizer:
    """A few words' tokens."""
    return Tokenizer.train(["a red apple on a blue background", "a dog"] * 9, 520, TEXT_ENCODER.max_position_embeddings)


def model(scheduler: SchedulerConfig = SCHEDULER, seed: int = 0, **configs: Any) -> Model:
    """A whole random model; `configs` replaces networks' configs, by role."""
    rng = np.random.default_rng(seed)
    networks = {}
    for role, config in (CONFIGS | configs).items():
        networks[role] = Network(config, random_params(StableDiffusion.FOLDERS[role], config, rng))
    return Model(networks, scheduler, tokenizer(), name="tiny")


def inpainting_model() -> Model:
    """A model whose denoiser takes a mask and a masked image."""
    return model(denoiser=replace(UNET, in_channels=9))


def xl_model(seed: int = 0, zero_empty: bool = True) -> Model:
    """A model of Stable Diffusion XL's kind: two text encoders, a vector of the prompt, sizes."""
    rng = np.random.default_rng(seed)
    second = replace(TEXT_ENCODER, hidden_size=24, projection_dim=12, hidden_act="gelu")
    unet = replace(
        UNET, cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    configs = {"denoiser": unet, "vae": VAE, "text_encoder": TEXT_ENCODER, "text_encoder_2": second}
    networks = {
        role: Network(config, random_params(StableDiffusionXL.FOLDERS[role], config, rng))
        for role, config in configs.items()
    }
    first = tokenizer()
    return Model(
        networks, SCHEDULER, first, StableDiffusionXL, name="tiny-xl", tokenizer_2=first.padded_with(0),
        zero_empty=zero_empty,
    )  # fmt: skip


def write_image_encoder(folder: Path, config: CLIPVisionConfig = IMAGE_ENCODER, seed: int = 0) -> Path:
    """A vision tower's folder as transformers writes it; returns the folder."""
    folder.mkdir(exist_ok=True)
    values = to_dict(config) | {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]}
    (folder / "config.json").write_text(json.dumps(values))
    params = random_params("image_encoder", config, np.random.default_rng(seed))
    write_safetensors(folder / "model.safetensors", stored(torch_views(params)))
    return folder


def off(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference between two images, of 255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


TASK = DiffusionTask(
    unet=UNetConfig(
        sample_size=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
    ),
    scheduler=SchedulerConfig(prediction_type="v_prediction"),
)
"""What is trained on latents of 4x4 and six tokens."""

_XL_TEXT = replace(TASK.text_encoder, num_hidden_layers=2)
XL_TASK = replace(
    TASK,
    unet=replace(
        TASK.unet, cross_attention_dim=8 + 12, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    ),
    text_encoder=_XL_TEXT,
    text_encoder_2=replace(_XL_TEXT, hidden_size=12, projection_dim=10, hidden_act="gelu"),
)  # fmt: skip
"""The same of Stable Diffusion XL's kind."""
