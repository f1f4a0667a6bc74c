"""Stable Diffusion XL (Podell et al. 2023): two CLIP text encoders, and a denoiser that is told sizes, too.

Both text encoders give the features before their last layer, without a norm. The second one's projection is a vector
for the whole prompt. Beside it the denoiser reads numbers: what size the image is to look like, where it was cut
(section 2.2), and of the refiner how well people liked it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxdiff.config import CLIPTextConfig, UNetConfig
from jaxdiff.families.latent_diffusion import LatentDiffusion, Size, in_a_row, weighed
from jaxdiff.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxdiff.types import Conditioning, Params, Tokens

NEGATIVE_SCORE = 2.5
"""The aesthetic score that a negative prompt stands for, in the refiner."""


@dataclass(frozen=True)
class StableDiffusionXLRefiner(LatentDiffusion):
    """The model that draws the last steps (section 2.5), which has the second text encoder alone."""

    text_encoder_2: CLIPTextModelWithProjection

    FOLDERS: ClassVar[Mapping[str, str]] = {"denoiser": "unet", "vae": "vae", "text_encoder_2": "text_encoder_2"}
    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder_2",)
    READS: ClassVar[frozenset[str]] = frozenset({"original_size", "crop", "aesthetic_score"})
    PIPELINE: ClassVar[str] = "StableDiffusionXLImg2ImgPipeline"
    NUMBERS: ClassVar[int] = 5
    """What the denoiser reads beside the prompt's vector."""

    @classmethod
    def check_added(cls, unet: UNetConfig, texts: Sequence[CLIPTextConfig]) -> None:
        """Whether the denoiser reads a prompt's vector and as many numbers as the family has.

        Raises:
            ValueError: where it does not.
        """
        if unet.labels is not None:
            raise ValueError(f"The denoiser's num_class_embeds is {unet.labels}; Stable Diffusion XL's is null.")
        pooled, each = texts[-1].projection_dim, unet.addition_time_embed_dim
        if unet.addition_embed_type is None or each is None:
            raise ValueError("The denoiser reads no sizes (addition_embed_type is null), as Stable Diffusion XL's do.")
        if (found := unet.added_features) != pooled + cls.NUMBERS * each:
            raise ValueError(
                f"The denoiser's projection_class_embeddings_input_dim is {found}; with text_encoder_2's "
                f"projection_dim {pooled} and {cls.NUMBERS} numbers of addition_time_embed_dim {each} features it must "
                f"be {pooled + cls.NUMBERS * each}."
            )

    @property
    def text_layers(self) -> int:
        """Layers of the text encoder, of which clip_skip leaves out some; the last is left out anyway."""
        return self.text_encoder_2.layers - 1

    def encode_prompts(self, params: Sequence[Params], tokens: Sequence[Tokens], clip_skip: int = 0) -> Conditioning:
        """Tokens to features, chunk after chunk, and the first chunk's vector; see `LatentDiffusion.encode_prompts`."""
        encoder = self.text_encoder_2.clone(penultimate=True, skip_layers=clip_skip)
        features, (pooled,) = weighed(lambda rows: encoder.apply({"params": params[-1]}, rows), tokens[-1])  # pyright: ignore
        return Conditioning(in_a_row(features), pooled)

    def sizes(
        self, size: Size, original_size: Size, crop: tuple[int, int], aesthetic_score: float
    ) -> Float32[np.ndarray, "2 k"]:
        """Height and width, top and left, and the score."""
        where = (*original_size[::-1], *crop[::-1])
        return np.array([(*where, NEGATIVE_SCORE), (*where, aesthetic_score)], np.float32)


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusionXLRefiner):
    """The model that draws from noise, with both text encoders."""

    text_encoder: CLIPTextModel

    FOLDERS: ClassVar[Mapping[str, str]] = {
        "denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2",
    }  # fmt: skip
    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    READS: ClassVar[frozenset[str]] = frozenset({"original_size", "crop"})
    PIPELINE: ClassVar[str] = "StableDiffusionXLPipeline"
    NUMBERS: ClassVar[int] = 6

    @property
    def text_layers(self) -> int:
        """Layers of the smaller text encoder, of which clip_skip leaves out some; the last is left out anyway."""
        return min(self.text_encoder.layers, self.text_encoder_2.layers) - 1

    def encode_prompts(self, params: Sequence[Params], tokens: Sequence[Tokens], clip_skip: int = 0) -> Conditioning:
        """As of the refiner, after the features of the first text encoder."""
        encoder = self.text_encoder.clone(penultimate=True, skip_layers=clip_skip)
        first, _ = weighed(lambda rows: (encoder.apply({"params": params[0]}, rows),), tokens[0])  # pyright: ignore
        second = super().encode_prompts(params, tokens, clip_skip)
        return second._replace(context=jnp.concatenate([in_a_row(first), second.context], axis=-1))

    def sizes(
        self, size: Size, original_size: Size, crop: tuple[int, int], aesthetic_score: float
    ) -> Float32[np.ndarray, "2 k"]:
        """Height and width, top and left, and the height and width of the image that is drawn."""
        return np.array([(*original_size[::-1], *crop[::-1], *size[::-1])] * 2, np.float32)
