"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a UNet, an autoencoder and one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxdiff.config import CLIPTextConfig, UNetConfig
from jaxdiff.families.latent_diffusion import LatentDiffusion, in_a_row, weighed
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.types import Conditioning, Params, Tokens


@dataclass(frozen=True)
class StableDiffusion(LatentDiffusion):
    """Prompts are the normed features of the text encoder's last layer that is not left out."""

    text_encoder: CLIPTextModel

    FOLDERS: ClassVar[Mapping[str, str]] = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    PIPELINE: ClassVar[str] = "StableDiffusionPipeline"

    @classmethod
    def check_added(cls, unet: UNetConfig, texts: Sequence[CLIPTextConfig]) -> None:
        """Whether the denoiser reads nothing but time and context.

        Raises:
            ValueError: where it reads more.
        """
        if unet.class_embed_type is not None:
            raise ValueError(
                f"The denoiser reads a vector beside a prompt (class_embed_type {unet.class_embed_type!r}), as that of "
                "an unCLIP, whose image_encoder or image_normalizer is missing: the model is not whole."
            )
        if unet.addition_embed_type is not None:
            raise ValueError(
                f"The denoiser reads more than a prompt (addition_embed_type {unet.addition_embed_type!r}), as that of "
                "Stable Diffusion XL, whose second text encoder is missing: the model is not whole."
            )

    @property
    def text_layers(self) -> int:
        """Layers of the text encoder, of which clip_skip leaves out some."""
        return self.text_encoder.layers

    def encode_prompts(self, params: Sequence[Params], tokens: Sequence[Tokens], clip_skip: int = 0) -> Conditioning:
        """Tokens to features, chunk after chunk; see `LatentDiffusion.encode_prompts`."""
        encoder = self.text_encoder.clone(skip_layers=clip_skip) if clip_skip else self.text_encoder
        features, _ = weighed(lambda rows: (encoder.apply({"params": params[0]}, rows),), tokens[0])  # pyright: ignore
        return Conditioning(in_a_row(features))
