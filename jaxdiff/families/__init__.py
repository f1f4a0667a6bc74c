"""Families of models: one module for each, which says what its networks are and how they are called."""

from jaxdiff.families.image_variations import ImageVariation, StableUnCLIP
from jaxdiff.families.latent_diffusion import LatentDiffusion as Family
from jaxdiff.families.stable_diffusion import StableDiffusion
from jaxdiff.families.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLRefiner

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusionXLRefiner, StableUnCLIP, ImageVariation,
)  # fmt: skip
"""All that are known, the most usual first."""


def family_of(folders: set[str]) -> type[Family] | None:
    """The family whose networks are in these folders of a diffusers model folder."""
    return next((family for family in FAMILIES if set(family.FOLDERS.values()) == folders), None)


__all__ = [
    "FAMILIES",
    "Family",
    "ImageVariation",
    "StableDiffusion",
    "StableDiffusionXL",
    "StableDiffusionXLRefiner",
    "StableUnCLIP",
    "family_of",
]
