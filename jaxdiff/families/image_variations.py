"""Stable Diffusion 1 and 2 whose denoiser reads an image by CLIP: in a prompt's place, or beside one.

The first is Pinkney's of Stable Diffusion 1 (2022), the second Stable unCLIP, of 2 (after Ramesh et al. 2022).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.config import CLIPTextConfig, UNetConfig
from jaxdiff.families.latent_diffusion import LatentDiffusion, check_reads_no_vector
from jaxdiff.families.stable_diffusion import StableDiffusion
from jaxdiff.models.clip_vision import CLIPVisionModelWithProjection
from jaxdiff.models.image_normalizer import StableUnCLIPImageNormalizer
from jaxdiff.types import Conditioning, Params, Tokens


@dataclass(frozen=True)
class ImageVariation(LatentDiffusion):
    """The context is one vector: an image's embedding, and zeros for what is steered away from."""

    image_encoder: CLIPVisionModelWithProjection

    FOLDERS: ClassVar[Mapping[str, str]] = {"denoiser": "unet", "vae": "vae", "image_encoder": "image_encoder"}
    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ()
    IMAGE_READERS: ClassVar[tuple[str, ...]] = ("image_encoder",)
    PIPELINE: ClassVar[str] = "StableDiffusionImageVariationPipeline"

    @classmethod
    def context_width(cls, configs: Mapping[str, Any]) -> tuple[int, str]:
        """The image encoder's projection."""
        width = configs["image_encoder"].projection_dim
        return width, f"image encoder's projection_dim {width}"

    @classmethod
    def check_added(cls, unet: UNetConfig, texts: Sequence[CLIPTextConfig]) -> None:
        """Whether the denoiser reads nothing but time and context.

        Raises:
            ValueError: where it reads more.
        """
        check_reads_no_vector(unet, "an image variation's")

    @property
    def context_features(self) -> int:
        """As many as the embedding has."""
        return self.image_encoder.projection_dim

    @property
    def text_layers(self) -> int:
        """Nothing can be left out of no text encoder."""
        return 1

    def encode_prompts(self, params: Sequence[Params], tokens: Sequence[Tokens], clip_skip: int = 0) -> Conditioning:
        """Zeros, whatever the texts, which `with_image` replaces."""
        return Conditioning(jnp.zeros((*tokens[0].ids.shape[:-2], 1, self.image_encoder.projection_dim)))

    def read_image(
        self, params: Sequence[Params], pixels: Float[Array, "b s s 3"], noise: Any, level: Any, alpha_bar: Any
    ) -> Float[Array, "b d"]:
        """The images' embeddings."""
        found: Any = self.image_encoder.apply({"params": params[0]}, pixels)
        return found.embedding

    def with_image(self, conditioning: Conditioning, vectors: Float[Array, "b d"]) -> Conditioning:
        """The embedding in every prompt's place but the negative one's."""
        return conditioning._replace(context=_for_prompts(vectors, conditioning.context.shape[1:3])[..., None, :])


@dataclass(frozen=True)
class StableUnCLIP(StableDiffusion):
    """Beside a prompt the denoiser reads a vector: an image's embedding with noise, and how much noise that is."""

    image_encoder: CLIPVisionModelWithProjection
    image_normalizer: StableUnCLIPImageNormalizer

    FOLDERS: ClassVar[Mapping[str, str]] = {
        **StableDiffusion.FOLDERS, "image_encoder": "image_encoder", "image_normalizer": "image_normalizer",
    }  # fmt: skip
    IMAGE_READERS: ClassVar[tuple[str, ...]] = ("image_encoder", "image_normalizer")
    PIPELINE: ClassVar[str] = "StableUnCLIPImg2ImgPipeline"

    @classmethod
    def of(cls, configs: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> Any:
        """As of other families.

        Raises:
            ValueError: where the networks do not fit together.
        """
        unet, width = configs["denoiser"], configs["image_encoder"].projection_dim
        found = unet.projection_class_embeddings_input_dim
        if unet.class_embed_type != "projection" or found != 2 * width:
            raise ValueError(
                f"The denoiser's class_embed_type is {unet.class_embed_type!r}, of {found} features; it must be "
                f"'projection', of {2 * width}, twice the image encoder's projection_dim."
            )
        if (dim := configs["image_normalizer"].embedding_dim) != width:
            raise ValueError(
                f"The image_normalizer's embedding_dim is {dim} and the image encoder's projection_dim {width}; they "
                "must be equal."
            )
        return super().of(configs, dtype)

    @classmethod
    def check_added(cls, unet: UNetConfig, texts: Sequence[CLIPTextConfig]) -> None:
        """Whether the denoiser reads no sizes.

        Raises:
            ValueError: where it does.
        """
        if unet.addition_embed_type is not None:
            raise ValueError(f"The denoiser's addition_embed_type is {unet.addition_embed_type!r}; unCLIP's is null.")

    def image_noise(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """As long as an embedding."""
        return (self.image_encoder.projection_dim,)

    def read_image(
        self,
        params: Sequence[Params],
        pixels: Float[Array, "b s s 3"],
        noise: Float[Array, "b d"],
        level: Float[Array, ""],
        alpha_bar: Float[Array, ""],
    ) -> Float[Array, "b d2"]:
        """The images' embeddings with noise, and behind them sinusoids of the noise's level."""
        found: Any = self.image_encoder.apply({"params": params[0]}, pixels)
        noised: Any = self.image_normalizer.apply({"params": params[1]}, found.embedding, noise, level, alpha_bar)
        return noised

    def with_image(self, conditioning: Conditioning, vectors: Float[Array, "b d"]) -> Conditioning:
        """The vector beside every prompt but the negative one, which has zeros."""
        return conditioning._replace(pooled=_for_prompts(vectors, conditioning.context.shape[1:3]))


def _for_prompts(vectors: Float[Array, "b d"], shape: tuple[int, ...]) -> Float[Array, "b phases prompts d"]:
    """Zeros for the first prompt, and the vectors for all others."""
    phases, prompts = shape
    is_negative = (np.arange(prompts) == 0)[None, None, :, None]
    whole = jnp.broadcast_to(vectors[:, None, None], (len(vectors), phases, prompts, vectors.shape[-1]))
    return jnp.where(is_negative, 0.0, whole)
