"""Embeddings of images by CLIP's vision tower, from a folder of transformers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from jaxdiff.io.image_encoder import ImageEncoder
from jaxdiff.models.clip_vision import CLIPVisionModelWithProjection

BATCH = 16
"""Images that are read at once."""


def image_embeddings(
    net: CLIPVisionModelWithProjection, encoder: ImageEncoder, images: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> Float32[np.ndarray, "n p"]:
    """The vectors of images, of any sizes, in the space that they share with texts; as long as the projection is.

    Args:
        net: the module, `jaxdiff.build.image_encoder(encoder.config, dtype)`.
        encoder: of `jaxdiff.io.image_encoder.read_image_encoder`; `jaxdiff.model.check_network` checks its shapes.
        images: at least one.
    """
    run = jax.jit(lambda params, pixels: net.apply({"params": params}, pixels).embedding)  # pyright: ignore
    params, found = jax.device_put(encoder.params), []
    for start in range(0, len(images), BATCH):
        some = [encoder.pixels(image) for image in images[start : start + BATCH]]
        padded = np.stack(some + some[-1:] * (BATCH - len(some)))  # one shape, compiled once
        found.append(np.asarray(run(params, jnp.asarray(padded)))[: len(some)])
    return np.concatenate(found)
