"""What reads captions in training: one text encoder, or the two of Stable Diffusion XL (Podell et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxdiff import build
from jaxdiff.build import Remat
from jaxdiff.config import DiffusionTask
from jaxdiff.training.state import apply
from jaxdiff.types import Conditioning, Params

TOKENS = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}
"""What a batch calls the tokens that each text encoder reads."""


def readers(task: DiffusionTask, dtype: DTypeLike = jnp.float32, remat: Remat = "none") -> dict[str, Any]:
    """The text encoders' modules, by the names of their folders.

    Of two, each gives the features before its last layer, without a norm, as Stable Diffusion XL's UNet reads them.
    """
    modules: dict[str, Any] = {
        name: getattr(build, name)(text, dtype, remat) for name, text in task.text_encoders.items()
    }
    return {name: module.clone(penultimate=task.reads_sizes) for name, module in modules.items()}


def read(modules: Mapping[str, Any], networks: Params, tokens: Mapping[str, Int[Array, "b t"]]) -> Conditioning:
    """What captions tell the UNet: the features of all text encoders side by side, and the second one's vector.

    Args:
        modules: what `readers` gives.
        networks: the text encoders' params, by the names of their folders.
        tokens: the captions as each text encoder reads them, by the names in `TOKENS`.
    """
    found = {name: apply(module, networks[name], tokens[TOKENS[name]]) for name, module in modules.items()}
    if "text_encoder_2" not in found:
        return Conditioning(found["text_encoder"])
    second, pooled = found["text_encoder_2"]
    return Conditioning(jnp.concatenate([found["text_encoder"], second], axis=-1), pooled)
