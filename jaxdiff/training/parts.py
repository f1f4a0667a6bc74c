"""Networks that a run starts from: read, checked, named."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxdiff import build
from jaxdiff.build import NetworkConfig
from jaxdiff.config import CLIPTextConfig, DataConfig, DiffusionTask, VAEConfig
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.folder import find_part, read_network
from jaxdiff.io.single_file import is_single, open_single
from jaxdiff.io.weights import check_params
from jaxdiff.runtime.compile import Compiled
from jaxdiff.runtime.mesh import path_name
from jaxdiff.types import Params


def read_part(path: str, name: str, wanted: NetworkConfig | None, field: str) -> tuple[Any, Params]:
    """The config and float32 params, shaped as `wanted`, of a network in the model `path`: a folder, a run, a file.

    Raises:
        ValueError: where `path` is empty, as `field` then names; as `find_part` and `read_network` do.
    """
    if not path:
        raise ValueError(
            f"{field} is empty: name a diffusers folder, run directory or single file that holds a trained {name}."
        )
    folder = find_part(path, name)
    config, params = read_network(folder, name)
    make = {"unet": build.unet, "vae": build.vae, "text_encoder": build.text_encoder}[name]
    params = check_params(params, build.param_shapes(make(wanted or config), wanted or config), folder)
    return config, jax.tree.map(lambda p: np.asarray(p, np.float32), params)


def read_vae(task: DiffusionTask, data: DataConfig) -> tuple[VAEConfig, Params]:
    """The config and params of the autoencoder that makes a diffusion task's latents.

    Raises:
        ValueError: where the UNet does not take its latents, or it does not take the images; or as `read_part` does.
    """
    vae, params = read_part(task.vae, "vae", None, "DiffusionTask.vae")
    if vae.latent_channels != task.unet.in_channels:
        raise ValueError(
            f"The VAE in {task.vae} has {vae.latent_channels} latent channels and UNetConfig.in_channels is "
            f"{task.unet.in_channels}; they must be equal."
        )
    check_size(data, vae)
    return vae, params


def check_size(data: DataConfig, vae: VAEConfig) -> None:
    """Refuses images that are not whole numbers of latent pixels wide and high."""
    for side in (side for shape in data.shapes for side in shape):
        if side % vae.factor:
            name = "side_multiple" if data.aspects else "size"
            raise ValueError(
                f"DataConfig.{name} {getattr(data, name)} is not a multiple of the VAE's factor {vae.factor}: images "
                f"have {side} pixels along a side."
            )


def read_tokenizer(task: DiffusionTask) -> Tokenizer:
    """The tokenizer, for captions as long as the text encoder reads.

    Raises:
        ValueError: where there is none, or it has more tokens than the text encoder knows.
    """
    if not task.tokenizer:
        raise ValueError("DiffusionTask.tokenizer is empty: name a folder with tokenizer.json, or a model's folder.")
    tokenizer = Tokenizer.load(find_part(task.tokenizer, "tokenizer"), task.text_encoder.max_position_embeddings)
    if task.init and is_single(task.init) and "text_encoder" not in task.scratch:
        tokenizer = tokenizer.padded_with(open_single(task.init).pad_id)
    if len(tokenizer) > task.text_encoder.vocab_size:
        raise ValueError(
            f"The tokenizer in {task.tokenizer} has {len(tokenizer)} tokens, more than CLIPTextConfig.vocab_size "
            f"{task.text_encoder.vocab_size}."
        )
    return tokenizer


def encoder(config: VAEConfig, params: Params, dtype: DTypeLike) -> Callable[[np.ndarray], np.ndarray]:
    """Images to moments, on the default device."""
    module, params = build.vae(config, dtype), jax.device_put(params)
    encode = Compiled(lambda params, image: module.apply({"params": params}, image, method="encode"))
    return lambda image: np.asarray(encode(params, image))


def text_encoder(
    config: CLIPTextConfig, params: Params, tokenize: Callable[[list[str]], np.ndarray], dtype: DTypeLike
) -> Callable[[list[str]], np.ndarray]:
    """Captions to their context [b, t, d], on the default device."""
    module, params = build.text_encoder(config, dtype), jax.device_put(params)
    encode = Compiled(lambda params, tokens: module.apply({"params": params}, tokens))
    return lambda texts: np.asarray(encode(params, tokenize(texts)))


def digest(params: Params, settings: Any = None) -> str:
    """Twelve letters that tell parameters and settings apart."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:12]
