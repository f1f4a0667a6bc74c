"""TAESD's folders, read: `config.json` of an AutoencoderTiny and its weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.config import TinyVAEConfig, load_json, naming
from jaxdiff.io.configs import one_spelling, read_values
from jaxdiff.io.convert import from_torch
from jaxdiff.io.weights import open_weights
from jaxdiff.types import Params

NAME = "tiny_vae"
_ONLY = {
    "in_channels": (3,), "out_channels": (3,), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,),
    "latent_magnitude": (3,), "shift_factor": (0.0,),
}  # fmt: skip
# What serves to store latents as pixels, and another name of the decoder's widths.
_IGNORED = frozenset({"latent_shift", "force_upcast", "block_out_channels"})


class TinyVAE(NamedTuple):
    """A tiny autoencoder for previews."""

    path: Path
    """The folder that it was read from."""
    config: Any
    params: Params


def read_tiny_vae(path: Path | str) -> TinyVAE:
    """A tiny autoencoder, in the type that it is stored in; its shapes are not checked here.

    Raises:
        ValueError: in one sentence, where the folder is none of one, or damaged.
    """
    path = Path(path)
    if not (file := path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the folder of an AutoencoderTiny, such as TAESD's.")
    values = one_spelling(load_json(file))
    if (cls := values.get("_class_name")) != "AutoencoderTiny":
        raise ValueError(f"{file}: the class is {json.dumps(cls)}; supported: AutoencoderTiny.")
    config = read_values(file, values, TinyVAEConfig, _ONLY, _IGNORED)
    tensors = open_weights(path, "diffusion_pytorch_model")
    with naming(path):
        return TinyVAE(path, config, from_torch(tensors.items()))
