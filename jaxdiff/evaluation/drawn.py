"""Measures of what a model draws while it is trained, for the captions of held-out images, against these images."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation import frechet, mmd
from jaxdiff.evaluation.denoising import Heldout
from jaxdiff.evaluation.features import FeaturesFn
from jaxdiff.evaluation.neighbours import support
from jaxdiff.evaluation.two_sample import nearest_neighbour_test
from jaxdiff.generation.pipeline import Pipeline

LEAST = 20
Features = Float[np.ndarray, "n d"]


def _frechet(x: Features, y: Features) -> dict[str, float]:
    return {"fd": frechet.frechet(x, y)}


def _kid(x: Features, y: Features) -> dict[str, float]:
    found = mmd.permutation_test(x, y, mmd.polynomial(x.shape[1]), permutations=200, paired=True)
    return {"kid": mmd.kid(x, y), "kid_error": found.error, "kid_p": found.p}


def _support(x: Features, y: Features) -> dict[str, float]:
    return support(x, y)._asdict()


def _told_apart(x: Features, y: Features) -> dict[str, float]:
    found = nearest_neighbour_test(x, y, paired=True)
    return {"told_apart": found.accuracy, "told_apart_p": found.p}


MEASURES: Mapping[str, Callable[[Features, Features], dict[str, float]]] = {
    "fd": _frechet,
    "kid": _kid,
    "support": _support,
    "told_apart": _told_apart,
}
"""Of the features of what is drawn and of real images, by the names that `TrainConfig.eval_measures` has for them."""


class DrawnMeasures:
    """Draws each held-out image's full caption with a seed of its own, the same ones every time, and measures."""

    def __init__(self, names: Sequence[str], data: Heldout, features: FeaturesFn, batch: int = 16) -> None:
        """Looks at the held-out images.

        Args:
            names: of `MEASURES`.
            data: held-out images and captions.
            features: from images to features.
            batch: images drawn together.

        Raises:
            ValueError: for another name, or too few images.
        """
        if strange := [name for name in names if name not in MEASURES]:
            raise ValueError(f"There is no measure {strange[0]!r}; choose {', '.join(MEASURES)}.")
        if len(data.images) < LEAST:
            raise ValueError(f"There are {len(data.images)} held-out images; measures of what is drawn need {LEAST}.")
        self._names, self._captions, self._features = tuple(names), data.captions["full"], features
        self._batch = min(batch, len(data.images))
        self._real = features(data.images)

    def __call__(self, pipe: Pipeline, steps: int) -> dict[str, float]:
        """The figures of a model, drawn in so many steps."""
        n, drawn = len(self._captions), []
        for first in range(0, n, self._batch):
            places = [min(i, n - 1) for i in range(first, first + self._batch)]  # one program serves all
            images = pipe([self._captions[i] for i in places], seed=places, steps=steps, literal=True)
            drawn += list(images)[: n - first]
        seen = self._features(np.stack(drawn))
        return {key: value for name in self._names for key, value in MEASURES[name](seen, self._real).items()}
