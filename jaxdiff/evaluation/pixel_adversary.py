"""The adversary that looks at pixels: a small convolutional network is trained to tell two sets of images apart.

Networks find first what no eye minds: another file format, another resizing, the autoencoder. Compare with real images
that went through the same of them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxdiff.evaluation.mmd import check_paired
from jaxdiff.evaluation.two_sample import PERMUTATIONS, Verdict, held_out_test
from jaxdiff.models.adversary import Adversary
from jaxdiff.types import Params

CROP = 64
"""Pixels along each side of what it looks at, or fewer where images are smaller: parts of larger images."""
STEPS, BATCH, RATE, DECAY = 300, 64, 2e-3, 1e-2

Images = UInt8[np.ndarray, "n h w 3"]
_OPTIMISER = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=DECAY)


def pixel_test(
    first: Images,
    second: UInt8[np.ndarray, "m h2 w2 3"],
    *,
    paired: bool = False,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Verdict:
    """The network learns from one half of the images, mirrored and in parts, and is tested on the other.

    Args:
        first: one set.
        second: the other one, of the same size.
        paired: image i of both has one prompt.
        permutations: how many, for the p-value.
        seed: of the halves, the network, and the parts that it sees.

    Raises:
        ValueError: where sizes differ, there are fewer than 8 images, or they are smaller than 8 pixels.
    """
    if first.shape[1:] != second.shape[1:]:
        sizes = " and ".join(f"{x.shape[2]}x{x.shape[1]}" for x in (first, second))
        raise ValueError(f"The sets have images of {sizes}, by which any network tells them apart; give both one size.")
    if paired:
        check_paired(first, second)
    side = min(CROP, *first.shape[1:3])
    if side < 8 or min(len(first), len(second)) < 8:
        raise ValueError(f"There are {len(first)} and {len(second)} images of {first.shape[2]}x{first.shape[1]}; "
                         "the network needs 8 of each, of 8 pixels or more.")  # fmt: skip
    images = np.concatenate([first, second])
    labels = np.repeat([0, 1], [len(first), len(second)])

    def train(learnt: Int[np.ndarray, " t"]) -> Float32[np.ndarray, " n"]:
        rng = np.random.default_rng([seed, 1])
        params = dict(Adversary().init(jax.random.key(seed), jnp.zeros((1, side, side, 3)))["params"])
        state = params, _OPTIMISER.init(params)
        for _ in range(STEPS):
            chosen = learnt[rng.integers(len(learnt), size=BATCH)]
            state = _step(state, _parts(images, chosen, side, rng), labels[chosen].astype(np.float32))
        return _logits(state[0], images, side)

    return held_out_test(train, labels, len(first) if paired else None, permutations, seed)


def _parts(
    images: Images, chosen: Int[np.ndarray, " b"], side: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "b s s 3"]:
    """A random part of each, mirrored half of the time."""
    height, width = images.shape[1:3]
    tops, lefts = (rng.integers(0, n - side + 1, size=len(chosen)) for n in (height, width))
    corners = zip(chosen, tops, lefts, strict=True)
    parts = np.stack([images[i, top : top + side, left : left + side] for i, top, left in corners])
    mirrored = rng.random(len(parts)) < 0.5
    parts[mirrored] = parts[mirrored, :, ::-1]
    return parts


def _logits(params: Params, images: Images, side: int) -> Float32[np.ndarray, " n"]:
    """The mean over the four corners and the middle of each image."""
    down, across = (n - side for n in images.shape[1:3])
    corners = sorted({(0, 0), (0, across), (down, 0), (down, across), (down // 2, across // 2)})
    total = np.zeros(len(images), np.float32)
    for first in range(0, len(images), BATCH):
        part = images[first : first + BATCH]
        filled = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), np.uint8)])
        for top, left in corners:
            found = _forward(params, filled[:, top : top + side, left : left + side])
            total[first : first + BATCH] += np.asarray(found)[: len(part)] / len(corners)
    return total


@jax.jit
def _forward(params: Params, images: UInt8[Array, "b s s 3"]) -> Float[Array, " b"]:
    scaled = images.astype(jnp.float32) / 127.5 - 1
    return Adversary().apply({"params": params}, scaled)  # pyright: ignore[reportReturnType]


@partial(jax.jit, donate_argnums=0)
def _step(state: Any, images: UInt8[Array, "b s s 3"], labels: Float[Array, " b"]) -> Any:
    params, optimiser = state

    def loss(params: Params) -> Array:
        return optax.sigmoid_binary_cross_entropy(_forward(params, images), labels).mean()

    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its counts
        updates, optimiser = _OPTIMISER.update(jax.grad(loss)(params), optimiser, params)
        return optax.apply_updates(params, updates), optimiser
