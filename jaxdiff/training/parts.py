"""Networks that a run starts from: read, checked, named."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxdiff import build
from jaxdiff.build import NetworkConfig
from jaxdiff.config import CLIPTextConfig, DataConfig, DiffusionTask, VAEConfig
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.folder import TOKENIZERS, check_latents, find_part, read_network
from jaxdiff.io.single_file import is_single, open_single
from jaxdiff.io.weights import check_params
from jaxdiff.runtime.compile import Compiled
from jaxdiff.runtime.mesh import path_name
from jaxdiff.training.captions import TOKENS, read, readers
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
    module = getattr(build, name)(wanted or config)
    params = check_params(params, build.param_shapes(module, wanted or config), folder)
    return config, jax.tree.map(lambda p: np.asarray(p, np.float32), params)


def read_vae(task: DiffusionTask, data: DataConfig) -> tuple[VAEConfig, Params]:
    """The config and params of the autoencoder that makes a diffusion task's latents.

    Raises:
        ValueError: where the UNet does not take its latents, or it does not take the images; or as `read_part` does.
    """
    vae, params = read_part(task.vae, "vae", None, "DiffusionTask.vae")
    if task.reads_sizes and not is_single(task.vae):
        check_latents(find_part(task.vae, "vae"))
    if task.unet.class_embed_type is not None or task.unet.labels is not None:
        raise ValueError("The UNet reads an image's embedding (class_embed_type) or a label (num_class_embeds); such "
                         "models are sampled, and not trained.")  # fmt: skip
    if task.unet.in_channels == 2 * vae.latent_channels or task.unet.in_channels == vae.latent_channels + 1:
        raise ValueError(
            f"UNetConfig.in_channels is {task.unet.in_channels}, of a model that reads an image or a depth map beside "
            f"a latent of {vae.latent_channels} channels; such models are sampled, and not trained."
        )
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


def read_tokenizers(task: DiffusionTask) -> tuple[Tokenizer, ...]:
    """The tokenizer of each text encoder, for captions as long as these read.

    Raises:
        ValueError: where there is none, or it has more tokens than its text encoder knows.
    """
    if not task.tokenizer:
        raise ValueError("DiffusionTask.tokenizer is empty: name a folder with tokenizer.json, or a model's folder.")
    places = {"text_encoder": task.tokenizer, "text_encoder_2": task.tokenizer_2 or task.tokenizer}
    return tuple(_read_tokenizer(task, name, text, places[name]) for name, text in task.text_encoders.items())


def _read_tokenizer(task: DiffusionTask, name: str, text: CLIPTextConfig, place: str) -> Tokenizer:
    tokenizer = Tokenizer.load(find_part(place, TOKENIZERS[name]), text.max_position_embeddings)
    if task.init and is_single(task.init) and name not in task.scratch:
        tokenizer = tokenizer.padded_with(open_single(task.init).pads[name])
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"The tokenizer in {place} has {len(tokenizer)} tokens, more than CLIPTextConfig.vocab_size "
            f"{text.vocab_size} of the {name}."
        )
    return tokenizer


def encoder(config: VAEConfig, params: Params, dtype: DTypeLike) -> Callable[[np.ndarray], np.ndarray]:
    """Images to moments, on the default device."""
    module, params = build.vae(config, dtype), jax.device_put(params)
    encode = Compiled(lambda params, image: module.apply({"params": params}, image, method="encode"))
    return lambda image: np.asarray(encode(params, image))


def text_encoder(
    task: DiffusionTask, params: Params, tokenizers: Sequence[Callable[[list[str]], np.ndarray]], dtype: DTypeLike
) -> Callable[[list[str]], tuple[np.ndarray, ...]]:
    """Captions to their context [b, t, d] and, for Stable Diffusion XL, their vectors [b, p], on the default device.

    Args:
        task: has the text encoders' sizes.
        params: the text encoders', by the names of their folders.
        tokenizers: theirs, in the same order.
        dtype: what they compute in.
    """
    modules, params = readers(task, dtype), jax.device_put(params)
    encode = Compiled(lambda params, tokens: tuple(jax.tree.leaves(read(modules, params, tokens))))

    def encode_texts(texts: list[str]) -> tuple[np.ndarray, ...]:
        tokens = {TOKENS[name]: tokenize(texts) for name, tokenize in zip(modules, tokenizers, strict=True)}
        return tuple(np.asarray(array) for array in encode(params, tokens))

    return encode_texts


def digest(params: Params, settings: Any = None) -> str:
    """Twelve letters that tell parameters and settings apart."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:12]
