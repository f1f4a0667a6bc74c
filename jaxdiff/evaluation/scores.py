"""Scores of a set by itself: the inception score, and how well images fit their texts by CLIP."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class InceptionScore(NamedTuple):
    """The mean over splits, and their standard deviation."""

    mean: float
    deviation: float


def inception_score(logits: Float[np.ndarray, "n classes"], splits: int = 10) -> InceptionScore:
    """exp E KL(p(y | x) || p(y)) (Salimans et al. 2016, section 4), from 1 to the number of classes.

    Args:
        logits: a classifier's, of images in random order.
        splits: parts of the images that are scored apart; the fewer images in each, the lower the score.

    Raises:
        ValueError: where a split would have no image.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}; of {len(logits)} images there must be from 1 to as many.")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def clip_score(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"], scale: float = 2.5
) -> Float64[np.ndarray, " n"]:
    """scale max(cos(image, text), 0) of each image and its text, by CLIP's embeddings (Hessel et al. 2021, eq. 1).

    A scale of 100 gives the numbers that torchmetrics calls CLIP score.
    """
    a, b = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (images, texts))
    return scale * np.maximum((a * b).sum(1), 0)
