"""From images to features: each is resized on the host by a rule that has a name, and a network looks at batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from jaxdiff.evaluation.resize import Rule, resize
from jaxdiff.runtime.mesh import BATCH, make_mesh
from jaxdiff.types import Params

BATCH_SIZE = 32
"""Images on all devices together, at least."""


class Seen(NamedTuple):
    """What a network makes of images."""

    features: Float32[np.ndarray, "n d"]
    logits: Float32[np.ndarray, "n c"] | None
    """Of classes, where it is a classifier."""


class Prepare(NamedTuple):
    """How an image becomes what a network reads."""

    title: str
    one: Callable[[UInt8[np.ndarray, "h w 3"]], Float32[np.ndarray, "s s 3"]]


def resized(size: int, rule: Rule) -> Prepare:
    """To 0 to 255 in size x size pixels, by a rule of `jaxdiff.evaluation.resize`."""
    return Prepare(f"{size} px, {rule}", lambda image: resize(image[None], size, rule)[0])


class Extractor:
    """A network that looks at images. What it makes of an image depends on that alone, not on its batch.

    `title` names everything that features depend on beside the images: two numbers of different titles cannot be
    compared.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        prepare: Prepare,
        run: Callable[[Params, jax.Array], Any],
        params: Params,
        texts: Callable[[Sequence[str]], Float32[np.ndarray, "n d"]] | None = None,
    ) -> None:
        """Puts the params on all devices of this process.

        Args:
            name: the network's.
            digest: the first digits of its weights' hash.
            prepare: how images become what the network reads.
            run: from params and what it reads [b s s 3] to features [b d] and logits [b c] or None.
            params: the network's.
            texts: from texts to vectors that the features can be compared with, where it has learnt that.
        """
        self.name, self.texts = name, texts
        self.title = f"{name} (weights {digest}), {prepare.title}"
        self._prepare = prepare.one
        devices = jax.local_devices()
        mesh = make_mesh(devices=devices)
        self._spread = jax.NamedSharding(mesh, BATCH)
        self._batch = -(-BATCH_SIZE // len(devices)) * len(devices)
        self._params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        self._run = jax.jit(run)

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """The features of images that are there at once."""
        return self.look(images, len(images)).features

    def look(self, images: Iterable[UInt8[np.ndarray, "_ _ 3"]], count: int | None = None) -> Seen:
        """Features and logits of images as they come, of any sizes; no more than a batch of them is kept.

        Args:
            images: one after another.
            count: how many, for the progress that is shown where there are many.

        Raises:
            ValueError: where there are none.
        """
        features, logits = [], []
        shown = tqdm(total=count, desc="Features", unit=" images", disable=(count or 0) < 10 * self._batch)
        with shown:
            for batch in _batches(images, self._batch):
                pixels = np.stack([self._prepare(image) for image in batch])
                # The last batch is filled up, so that one program serves all.
                filled = np.pad(pixels, ((0, self._batch - len(batch)), (0, 0), (0, 0), (0, 0)))
                found, classes = self._run(self._params, jax.device_put(filled, self._spread))
                features.append(np.asarray(found)[: len(batch)])
                if classes is not None:
                    logits.append(np.asarray(classes)[: len(batch)])
                shown.update(len(batch))
        if not features:
            raise ValueError("There are no images to look at; give at least one.")
        return Seen(np.concatenate(features), np.concatenate(logits) if logits else None)


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
