"""Several images from one idea: the way from one prompt to another, and an image after each step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import count

Frames = UInt8[np.ndarray, "n h w 3"]


def interpolate(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], frames: int = 8, batch: int = 8, **fields: Any
) -> Frames:
    """Images on the way from the first prompt and seed through all others to the last: `frames` from each to the next.

    Args:
        pipe: the model.
        prompts: at least two.
        seeds: one for each.
        frames: images from one to the next, the next one not counted.
        batch: images drawn at once.
        fields: other arguments of `Pipeline.__call__`.

    Raises:
        ValueError: as `Pipeline.__call__`, and where there are fewer than two prompts, or not a seed for each.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else seeds
    if len(prompts) < 2 or len(prompts) != len(seeds):
        raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; give two or more, a seed for each.")
    frames, batch = count("frames", frames), count("batch", batch)
    legs = [(leg, i / frames) for leg in range(len(prompts) - 1) for i in range(frames)]
    legs.append((len(prompts) - 2, 1.0))
    batch = min(batch, len(legs))
    drawn = []
    for start in range(0, len(legs), batch):
        rows = legs[start : start + batch]
        rows += rows[-1:] * (batch - len(rows))  # the last batch has the others' size, so that it compiles nothing
        images = pipe(
            [prompts[leg] for leg, _ in rows],
            seed=[seeds[leg] for leg, _ in rows],
            to_prompt=[prompts[leg + 1] for leg, _ in rows],
            to_seed=[seeds[leg + 1] for leg, _ in rows],
            mix=[mix for _, mix in rows],
            **fields,
        )
        drawn.extend(images[: len(legs) - start])
    return np.stack(drawn)


def trajectory(pipe: Pipeline, prompt: str, **fields: Any) -> Frames:
    """The model's guess of the image after each step; the last is the image.

    Raises:
        ValueError: as `Pipeline.__call__`, and for more than one image.
    """
    frames: list[UInt8[np.ndarray, "h w 3"]] = []
    images = pipe(prompt, on_step=lambda step, guess: frames.append(pipe.decode(guess)[0]), **fields)
    if len(images) > 1:
        raise ValueError(f"There are {len(images)} images; give one prompt, and leave out n.")
    return np.stack([*frames[:-1], images[0]])
