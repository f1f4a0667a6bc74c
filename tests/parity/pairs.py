"""Tiny random Stable Diffusions, built live in diffusers and read by jaxdiff."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data.tokens import Tokenizer
from jaxdiff.families import StableDiffusion
from jaxdiff.io.convert import from_torch
from jaxdiff.model import Model, Network, read_model
from jaxdiff.types import Params

TEXTS = ["a red apple", "a dog on a blue background", "two green apples, flat style", "a cat and a dog"]
MAX_TOKENS = 12
ROLES = {folder: role for role, folder in StableDiffusion.FOLDERS.items()}
"""What jaxdiff calls the networks that diffusers calls "unet", "vae" and "text_encoder"."""


@dataclass(frozen=True)
class Pair:
    """One model, twice."""

    torch: Any
    """The StableDiffusionPipeline."""
    path: Path
    """Where it was saved."""
    ours: Model
    """What jaxdiff read from there."""

    def network(self, name: str) -> Network:
        """Our config and params of what diffusers calls so."""
        return self.ours.networks[ROLES[name]]


def randomise(module: Any, seed: int) -> Any:
    """Moves every bias and norm away from the 0 and 1 it is born with, which would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(True)


def make_pair(
    folder: Path,
    unet: dict[str, Any],
    text: dict[str, Any],
    scheduler: dict[str, Any],
    seed: int,
    vae: dict[str, Any] | None = None,
    pad: str = "<|endoftext|>",
) -> Pair:
    with warnings.catch_warnings(action="ignore"):
        import torch
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        torch.set_num_threads(1)  # on so small a model, threads only wait for each other
        torch.manual_seed(seed)
        tokenizer = Tokenizer.train(TEXTS * 3, 560, MAX_TOKENS)
        tokenizer.save(folder / "made_tokenizer")
        end = tokenizer.eos_id
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "bos_token_id": tokenizer.bos_id,
                "eos_token_id": end, "pad_token_id": end, "projection_dim": 16} | text  # fmt: skip
        vae = {"block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 32,
               "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 8,
               **(vae or {})}  # fmt: skip
        scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                     "clip_sample": False, "set_alpha_to_one": False} | scheduler  # fmt: skip
        pipe = StableDiffusionPipeline(
            vae=randomise(AutoencoderKL(**vae), seed + 1),
            text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**text)), seed + 2),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "made_tokenizer", pad_token=pad),
            unet=randomise(UNet2DConditionModel(**unet), seed + 3),
            scheduler=DDIMScheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder / "model")
        return Pair(pipe, folder / "model", read_model(folder / "model"))


SD1_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD2_UNET = SD1_UNET | {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "cross_attention_dim": 32,
    "upcast_attention": True,
}
SD1_TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SD2_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_act": "gelu",
}  # fmt: skip


# As small as the layouts of single files allow, which have groups of 32 and heads of 64 channels.
FILE_VAE = {"block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 128}
FILE_SD1_UNET = SD1_UNET | {
    "block_out_channels": (32, 64),
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "norm_num_groups": 32,
    "sample_size": 64,
}
FILE_SD2_UNET = SD2_UNET | {
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 128,
    "norm_num_groups": 32,
    "sample_size": 96,
}
FILE_SD1_TEXT = SD1_TEXT | {"hidden_size": 64, "num_attention_heads": 1}
FILE_SD2_TEXT = SD2_TEXT | {"hidden_size": 128, "num_attention_heads": 2}


def nhwc(x: Any) -> jax.Array:
    return jnp.asarray(x.detach().numpy().transpose(0, 2, 3, 1))


def nchw(x: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def torch_gradients(module: Any) -> Params:
    """The gradients of a network's parameters, as our params are; they are forgotten there."""
    import torch

    tensors = [(name, np.asarray(p.grad if p.grad is not None else torch.zeros_like(p))) for name, p in
               module.named_parameters()]  # fmt: skip
    module.zero_grad()
    return from_torch(tensors)


def relative_error(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs| over all leaves of a tree together."""
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), ours, theirs)

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))

    return norm(difference) / norm(theirs)
