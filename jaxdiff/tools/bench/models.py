"""What is timed by its name: the sizes of the networks, and weights, random where none are at hand."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.generation.weights import STEPS, Weights
from jaxdiff.io.folder import find_part, model_schedule, read_config, read_network
from jaxdiff.io.layouts import SCHEDULER
from jaxdiff.io.weights import check_params
from jaxdiff.model import EMBEDDED
from jaxdiff.runtime.mesh import place, tree_shardings
from jaxdiff.types import Params


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a text-to-image model, and where its weights are, if anywhere."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    scheduler: SchedulerConfig
    folder: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The model's own, or the embedded model's, whose tokens every larger vocabulary has."""
        return find_part(self.folder if self.folder is not None and self.folder.is_dir() else EMBEDDED, "tokenizer")

    @property
    def size(self) -> int:
        """Pixels along each side that the UNet was made for."""
        return max(self.unet.sides or (64,)) * self.vae.factor


SIZES = {
    "sd15": ModelSizes("sd15", UNetConfig(cross_attention_dim=768), VAEConfig(), CLIPTextConfig(), SCHEDULER),
    "sd21": ModelSizes(
        "sd21",
        UNetConfig(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        VAEConfig(sample_size=768),
        CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=512,
        ),
        SCHEDULER,
    ),
    # A UNet of 37 million parameters between SD1.5's autoencoder and text encoder.
    "small": ModelSizes(
        "small",
        UNetConfig(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768),
        VAEConfig(sample_size=256),
        CLIPTextConfig(),
        SCHEDULER,
    ),
}


def find_model(name: str) -> ModelSizes:
    """A size by name, `emoji` (the embedded model), or a diffusers folder, run directory or single file.

    Raises:
        ValueError: where it is none, or the folder lacks a part or its config is not supported.
    """
    if name in SIZES:
        return SIZES[name]
    folder = EMBEDDED if name == "emoji" else Path(name)
    if not folder.exists():
        raise ValueError(f"--model {name!r} is neither a folder nor a file nor one of emoji, {', '.join(SIZES)}.")
    configs = {part: read_config(folder, part) for part in ("unet", "vae", "text_encoder")}
    return ModelSizes(name, **configs, scheduler=model_schedule(folder), folder=folder)


def weights(model: ModelSizes, *parts: str) -> dict[str, Params]:
    """The params of "unet", "vae" or "text_encoder" on the host: the folder's, or random ones where it has none."""
    return {part: _weights(model, part) for part in parts}


def _weights(model: ModelSizes, part: str) -> Params:
    config = getattr(model, part)
    shapes = build.param_shapes(getattr(build, part)(config), config)
    if model.folder is None:
        return random_params(shapes)
    place = find_part(model.folder, part)
    if place.is_dir() and not any(file for kind in ("safetensors", "bin", "ckpt") for file in place.glob(f"*.{kind}")):
        return random_params(shapes)
    return check_params(read_network(place, part)[1], shapes, place)


def random_params(shapes: Any) -> Any:
    """Float32 arrays for a tree of shapes, each drawn by itself: nothing is compiled, and nothing is there twice.

    Kernels keep the variance of what they multiply, so that deep networks stay finite; norms are 1 and biases 0.
    """
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        kind = path[-1].key
        if kind in ("scale", "bias"):
            return np.full(leaf.shape, kind == "scale", np.float32)
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= 0.02 if kind == "embedding" else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def ready(params: dict[str, Params], mesh: Mesh, dtype: DTypeLike) -> dict[str, Params]:
    """The params as they are computed with, on the devices: on one, what `jaxdiff.load` makes of them."""
    if mesh.size == 1:
        roles = {part: STEPS if part == "unet" else part for part in params}
        placed = Weights({roles[part]: tree for part, tree in params.items()}, dtype)
        return {part: placed[role] for part, role in roles.items()}
    return place(params, tree_shardings(mesh, params))


def random_inputs(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Unit normal."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))
