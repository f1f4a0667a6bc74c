"""The error of the guess of x_0 on held-out images, by noise level and by what the caption tells.

It needs no sampling and knows no parameterisation, loss weights or guidance, so that any two models of one autoencoder
can be compared. At low noise it is about texture, which is seen; at high noise about what only the caption can say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jaxdiff.config import DataConfig, SchedulerConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.images import Cut, prepare
from jaxdiff.data.record import BadRecord, Source
from jaxdiff.diffusion.denoiser import make_denoiser
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.evaluation import check_count
from jaxdiff.families import Family
from jaxdiff.generation.conditioning import one_chunk
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.types import Params, Tokens

LEVELS = (0.6, 1.2, 2.5, 5.0, 10.0, 30.0)
"""Noise levels sigma, in x = x_0 + sigma eps at unit variance."""

# Errors by what captions tell, and within that by noise level.
Errors = dict[str, dict[float, float]]


@dataclass(frozen=True)
class Heldout:
    """Images, and captions of several kinds for each of them."""

    images: UInt8[np.ndarray, "n h w 3"]
    cuts: tuple[Cut, ...]
    """Of which picture each image is which part."""
    captions: dict[str, list[str]]
    """`full`; `unlabelled`, which tells style and background alone, where captions have such parts; `wrong`, with
    another image's label; `empty`."""


def heldout(source: Source, config: DataConfig, n: int, seed: int = 0) -> Heldout:
    """`n` images of a source, evenly spread, each on a background of its own; the same ones every time.

    Args:
        source: images with captions.
        config: gives the images' shape, one for all.
        n: fewer where the source has fewer, or some of these cannot be read.
        seed: fixes the backgrounds.

    Raises:
        ValueError: where none can be read, or there are no images but latents.
    """
    check_count("n", n)
    if config.source == "latents":
        raise ValueError("The error of the guess is measured on images, and the data are latents.")
    n = min(n, len(source))
    config = replace(config.of_one_shape(), crop=1.0, flip=False)
    shape = config.shapes[0]
    images: list[np.ndarray] = []
    cuts: list[Cut] = []
    captions: list[Caption] = []
    for index in (i * len(source) // n for i in range(n)):
        try:
            image, caption, cut = prepare(source.record(index), np.random.default_rng([seed, index]), config, shape)
        except BadRecord:
            continue
        images.append(image)
        cuts.append(cut)
        captions.append(caption)
    if not images:
        raise ValueError("No image of the data can be read; name others to measure on.")
    return Heldout(np.stack(images), tuple(cuts), _kinds(captions))


def _kinds(captions: Sequence[Caption]) -> dict[str, list[str]]:
    n = len(captions)
    labels = [caption.label for caption in captions]

    def other(i: int) -> str:
        """The label of an image far from this one, another than its own."""
        return next((label for label in labels[i + n // 2 :] + labels if label != labels[i]), "")

    kinds = {"full": [caption.full() for caption in captions]}
    if any(caption.style or caption.colour for caption in captions):
        kinds["unlabelled"] = [replace(caption, label="").full() for caption in captions]
    if len(set(labels)) > 1:
        kinds["wrong"] = [replace(caption, label=other(i)).full() for i, caption in enumerate(captions)]
    return kinds | {"empty": [""] * n}


def denoising_errors(
    pipe: Pipeline,
    data: Heldout,
    levels: Iterable[float] = LEVELS,
    kinds: Iterable[str] | None = None,
    batch: int = 32,
    seed: int = 0,
) -> Errors:
    """The mean squared error of the model's guess of x_0, a number of a latent, by kind of caption and noise level.

    Latents have about unit variance, so that 1 is what a guess of 0 has. All kinds and levels have the same noise.

    Args:
        pipe: the model.
        data: what is measured on.
        levels: noise levels.
        kinds: those of `data.captions` that are measured; all by default.
        batch: images at a time.
        seed: fixes the noise.

    Raises:
        ValueError: where the model's denoiser takes more than a noisy latent, a prompt and an image's sizes.
    """
    networks = pipe.networks
    if networks.needs_image or networks.embeds_guidance or "aesthetic_score" in networks.READS:
        raise ValueError("The denoiser takes more than noisy latents, prompts and sizes, such as a mask or a score; "
                         "this measures those that take no more.")  # fmt: skip
    check_count("batch", batch)
    n = len(data.images)
    batch = min(batch, n)
    rng = np.random.default_rng(seed)
    program = partial(_squares, networks=networks, scheduler=pipe.model.scheduler)
    params = pipe.params["denoiser"], tuple(pipe.params[role] for role in networks.TEXT_ENCODERS)
    tokenizers = pipe.model.tokenizers
    sums: Errors = {kind: dict.fromkeys(levels, 0.0) for kind in (kinds or data.captions)}
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n  # the last batch is filled up, and its copies not counted
        count = min(batch, n - first)
        numbers = _numbers(networks, [data.cuts[row] for row in rows])
        x_0 = pipe.encode(data.images[rows])
        eps = jnp.asarray(rng.standard_normal(x_0.shape), jnp.float32)
        for kind, errors in sums.items():
            captions = [data.captions[kind][row] for row in rows]
            tokens = tuple(one_chunk(captions, tokenizer) for tokenizer in tokenizers)
            nothing = jnp.array([not caption for caption in captions]) if pipe.model.zero_empty else None
            for level in errors:
                squares = program(*params, tokens, numbers, nothing, x_0, eps, jnp.float32(level))
                errors[level] += float(np.asarray(squares)[:count].sum()) / n
    return sums


def _numbers(networks: Family, cuts: Sequence[Cut]) -> Float[Array, "b k"] | None:
    """What the denoiser is told of these images beside their prompts."""
    rows = [
        networks.numbers(
            (cut.width, cut.height), (cut.original_width, cut.original_height), (cut.left, cut.top), 0.0, 1.0
        )
        for cut in cuts
    ]
    told = [row[1] for row in rows if row is not None]  # the first is a negative prompt's
    return jnp.asarray(np.stack(told)) if told else None


@partial(jax.jit, static_argnames=("networks", "scheduler"))
def _squares(
    params: Params,
    text_params: tuple[Params, ...],
    tokens: tuple[Tokens, ...],
    numbers: Float[Array, "b k"] | None,
    nothing: Bool[Array, " b"] | None,
    x_0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    sigma: Float[Array, ""],
    *,
    networks: Family,
    scheduler: SchedulerConfig,
) -> Float[Array, " b"]:
    """The squared error of each image's guess. (`Pipeline.denoiser` makes the negative prompt's guess, too.)

    Prompts are zeros where they are `nothing`.
    """
    conditioning = networks.encode_prompts(text_params, tokens)
    if nothing is not None:
        conditioning = jax.tree.map(
            lambda rows: jnp.where(nothing.reshape(-1, *[1] * (rows.ndim - 1)), jnp.zeros_like(rows), rows),
            conditioning,
        )
    conditioning = conditioning._replace(extra=numbers)
    prepared = networks.prepare(params, conditioning)

    def network(x_in: Array, t: Array) -> Array:
        return networks.predict(params, x_in, jnp.full(len(x_in), t), conditioning, prepared)

    denoise = make_denoiser(network, make_schedule(scheduler), PREDICTIONS[scheduler.prediction_type])
    return jnp.square(denoise(x_0 + sigma * eps, sigma) - x_0).mean((1, 2, 3))


def as_metrics(errors: Errors) -> dict[str, float]:
    """Errors as lines of `metrics.jsonl` have them: `error_full_30`."""
    return {f"error_{kind}_{level:g}": value for kind, by_level in errors.items() for level, value in by_level.items()}


def as_table(errors: Errors) -> str:
    """Errors in lines of text, one for each kind of caption."""
    first = next(iter(errors.values()))
    rows = [("sigma", [f"{level:g}" for level in first])]
    rows += [(kind, [f"{error:.4f}" for error in by_level.values()]) for kind, by_level in errors.items()]
    return "\n".join(name.ljust(12) + "".join(value.rjust(9) for value in values) for name, values in rows)
