"""What takes more than one call of a pipeline, or a picture got ready for one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.arguments import pictures, texts, whole
from jaxdiff.io.images import outpaint_canvas
from jaxdiff.pipeline import Pipeline

Picture = UInt8[np.ndarray, "h w 3"]
Resized = UInt8[np.ndarray, "h2 w2 3"]
Frames = UInt8[np.ndarray, "n h w 3"]

UPSCALE_STRENGTH = 0.35
"""How much of an enlarged image is drawn anew, where nothing else is said."""


def fitted(pipe: Pipeline, image: Picture, size: tuple[int, int] | None = None) -> Resized:
    """The image at a size that the pipeline can draw, its middle if the aspect is another.

    Args:
        pipe: the model.
        image: of any size.
        size: width and height in pixels; None makes the shorter side the model's own, and the longer a multiple of what
            the network halves to whole numbers.
    """
    height, width = image.shape[:2]
    size = size or fitted_size(pipe, (width, height))
    across = min(width, height * size[0] / size[1])
    down = min(height, width * size[1] / size[0])
    left, top = (width - across) / 2, (height - down) / 2
    picture = Image.fromarray(image)
    if (width, height) == size:
        return image
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + across, top + down)))


def fitted_size(pipe: Pipeline, size: tuple[int, int]) -> tuple[int, int]:
    """The width and height at which `fitted` makes a picture of this width and height fit."""
    grain = pipe.model.vae.factor * 2 ** (len(pipe.model.unet.block_out_channels) - 1)
    scale = min(pipe.size or size) / min(size)
    width, height = (max(1, round(side * scale / grain)) * grain for side in size)
    return width, height


def interpolate(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], frames: int = 8, batch: int = 8, **given: Any
) -> Frames:
    """A way from the first prompt and seed to the last, through all between: `frames` pictures from each to the next.

    Args:
        pipe: the model.
        prompts: at least two.
        seeds: one for each.
        frames: how many pictures from one to the next, the next one not counted.
        batch: so many are drawn at once.
        given: what else `Pipeline.__call__` takes.

    Raises:
        ValueError: as `Pipeline.__call__`, and where there are fewer than two prompts, or not a seed for each.
    """
    prompts = texts(prompts)
    seeds = [seeds] if isinstance(seeds, int) else seeds
    if len(prompts) < 2 or len(prompts) != len(seeds):
        raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; give two or more, a seed for each.")
    if whole("frames", frames) < 1:
        raise ValueError(f"frames is {frames}; it must be at least 1.")
    legs = [(leg, i / frames) for leg in range(len(prompts) - 1) for i in range(frames)]
    legs.append((len(prompts) - 2, 1.0))
    batch = min(batch, len(legs))
    drawn = []
    for start in range(0, len(legs), batch):
        rows = legs[start : start + batch]
        rows += rows[-1:] * (batch - len(rows))  # the last batch has the others' size, not to compile again
        images = pipe(
            [prompts[leg] for leg, _ in rows],
            seed=[seeds[leg] for leg, _ in rows],
            to_prompts=[prompts[leg + 1] for leg, _ in rows],
            to_seed=[seeds[leg + 1] for leg, _ in rows],
            share=[share for _, share in rows],
            **given,
        )
        drawn.extend(images[: len(legs) - start])
    return np.stack(drawn)


def trajectory(pipe: Pipeline, prompt: str, **given: Any) -> Frames:
    """The model's guess of the picture after each step; the last is the picture.

    Raises:
        ValueError: as `Pipeline.__call__`.
    """
    frames = []
    pipe(prompt, watch=lambda step, images: frames.append(images[0]), **given)
    return np.stack(frames)


def outpaint(
    pipe: Pipeline, prompt: str, image: Picture, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0,
    **given: Any,
) -> Resized:  # fmt: skip
    """The image with more round it, its own pixels as they are.

    Args:
        pipe: the model.
        prompt: what is in the whole.
        image: of sides that the model can draw.
        left: so many pixels more, a multiple of the VAE's factor; so for the other sides.
        top: as left.
        right: as left.
        bottom: as left.
        given: what else `Pipeline.__call__` takes.

    Raises:
        ValueError: as `Pipeline.__call__` and `outpaint_canvas`.
    """
    (image,) = pictures("image", image, 1)
    canvas, mask = outpaint_canvas(image, left, right, top, bottom)
    return pipe(prompt, image=canvas, mask=mask, **given)[0]


def upscale(
    pipe: Pipeline,
    prompt: str,
    image: Picture,
    factor: int = 2,
    strength: float = UPSCALE_STRENGTH,
    latent: bool = False,
    **given: Any,
) -> Resized:
    """The image `factor` times as wide and high, its detail drawn anew.

    It is enlarged, and at `strength` drawn from as any image, through windows of the model's own size where it is
    larger.

    Args:
        pipe: the model.
        prompt: what is in the image.
        image: of sides that the model can draw.
        factor: at least 1.
        strength: how much is drawn anew, 0 to 1.
        latent: stretches the latent in place of the pixels (the setting `enlarge`): more is invented, and has to be,
            so `strength` should be 0.5 and more.
        given: what else `Pipeline.__call__` takes.

    Raises:
        ValueError: as `Pipeline.__call__`, and for a factor below 1.
    """
    (image,) = pictures("image", image, 1)
    if whole("factor", factor) < 1:
        raise ValueError(f"The factor is {factor}; it must be at least 1.")
    size = image.shape[1] * factor, image.shape[0] * factor
    if pipe.size is not None and max(size) > max(pipe.size):
        given = {"window": max(pipe.size)} | given
    if latent:
        return pipe(prompt, image=image, strength=strength, enlarge=factor, **given)[0]
    return pipe(prompt, image=fitted(pipe, image, size), strength=strength, **given)[0]
