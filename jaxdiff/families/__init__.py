"""Families of models: one module for each, which says what its networks are and how they are called."""

from jaxdiff.families.stable_diffusion import StableDiffusion

Family = StableDiffusion
"""What the rest of the package asks of a family; with a second family this becomes their union."""
FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)

__all__ = ["FAMILIES", "Family", "StableDiffusion"]
