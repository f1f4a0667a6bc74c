"""Concept accuracy: does what is drawn show the concept that was asked for?

An image is looked up among real drawings of all concepts, by its features: the concept that was asked for should be
that of the nearest drawing (R@1), or among the ten concepts whose drawings are nearest (R@10). Alone the numbers say
little, as a classifier of photographs does not know every emoji; the anchors say what the best and the worst model
would have.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.images import decode, on_background
from jaxdiff.data.sources import open_source
from jaxdiff.evaluation import check_count
from jaxdiff.evaluation.features import FeaturesFn
from jaxdiff.generation.pipeline import Pipeline

SPLITS = ("train", "test", "heldout")
GROUND = "white"
DIMENSIONS = 256
"""Principal components of the real drawings' features that are compared."""
MEASURE = (
    f"concept accuracy, EfficientNet-Lite0 at 224 px (bicubic, not rounded), {DIMENSIONS} whitened dimensions, cosine"
)
"""All that a number depends on beside the drawings, the images and their number."""


@dataclass(frozen=True)
class Drawings:
    """Real drawings on `GROUND`; a concept is known by its label."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: tuple[str, ...]
    styles: tuple[str, ...]
    splits: tuple[str, ...]

    def prompt(self, i: int | np.integer) -> str:
        """The caption of one in training: "red apple, noto style, on a white background"."""
        return Caption(self.labels[i], self.styles[i], colour=GROUND).full()


def read_drawings(data_dir: str, size: int = 64) -> Drawings:
    """Every drawing of the `emoji` data, in the order of its files.

    Args:
        data_dir: where `python -m jaxdiff.tools.prepare emoji` put it.
        size: pixels along each side, of the set that is taken: that of 64, or else that of 128.

    Raises:
        ValueError: where it is not there.
    """
    images, labels, styles, splits = [], [], [], []
    for split in SPLITS:
        source = open_source(DataConfig(source="emoji", root=data_dir, split=split, size=size))
        for i in range(len(source)):
            record = source.record(i)
            images.append(np.asarray(on_background(decode(record.image).convert("RGBA"), GROUND)))
            labels.append(record.caption.label)
            styles.append(record.caption.style)
            splits.append(split)
    return Drawings(np.stack(images), tuple(labels), tuple(styles), tuple(splits))


def sample(drawings: Drawings, n: int, seed: int = 0, split: str = "all") -> Int[np.ndarray, " n"]:
    """Places of `n` drawings, none twice; a smaller sample is the beginning of a larger one.

    Raises:
        ValueError: where there are not so many.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    places = np.flatnonzero([split in ("all", s) for s in drawings.splits])
    if not 2 <= n <= len(places):
        raise ValueError(f"n is {n}; of the split {split!r} it must be from 2 to {len(places)} drawings.")
    return np.random.default_rng(seed).permutation(places)[:n]


@dataclass(frozen=True)
class Gallery:
    """Features of real drawings as directions: whitened (of no correlation and unit variance), then of unit length.

    Measured on the emoji, 1,024 drawings whose own files are left out: R@1 .517 and R@10 .794; of features as the
    network gives them .480 and .741, whitened to 128 or 512 dimensions .508 and .773, or .521 and .812, and whitened
    without unit length .479 and .740.
    """

    concepts: tuple[str, ...]
    """Each one once, sorted."""
    concept: Int[np.ndarray, " n"]
    """Of each drawing, its place in `concepts`."""
    points: Float[np.ndarray, "n k"]
    mean: Float[np.ndarray, " d"]
    matrix: Float[np.ndarray, "d k"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], labels: Sequence[str], dimensions: int = DIMENSIONS) -> "Gallery":
        """From the drawings' features and labels; components without variance are left out."""
        mean = features.mean(0, dtype=np.float64)
        centred = features - mean
        variances, directions = np.linalg.eigh(centred.T @ centred / len(features))
        variances, directions = variances[::-1][:dimensions], directions[:, ::-1][:, :dimensions]
        held = variances > 1e-10 * variances[0]
        matrix = directions[:, held] / np.sqrt(variances[held])
        concepts, concept = np.unique(np.asarray(labels), return_inverse=True)
        return cls(tuple(map(str, concepts)), concept, _unit(centred @ matrix), mean, matrix)

    def distances(
        self, features: Float[np.ndarray, "b d"], left_out: Int[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b concepts"]:
        """1 - the cosine of each image and the nearest drawing of each concept; infinite where it has none.

        Args:
            features: of the images, as the network gives them.
            left_out: for each image one drawing, by its place, that it is not compared with.
        """
        distances = 1 - _unit((features - self.mean) @ self.matrix) @ self.points.T
        if left_out is not None:
            distances[np.arange(len(features)), left_out] = np.inf
        order = np.argsort(self.concept, kind="stable")
        begins = np.searchsorted(self.concept[order], np.arange(len(self.concepts)))
        return np.minimum.reduceat(distances[:, order], begins, axis=1)


def _unit(points: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def ranks(distances: Float[np.ndarray, "b concepts"], wanted: Int[np.ndarray, " m"]) -> Int[np.ndarray, "b m"]:
    """For each image and each wanted concept, how many concepts are at least as near, itself among them; 1 is best.

    What is equally near counts against the concept, so that features that tell nothing apart find nothing.
    """
    return np.stack([np.searchsorted(np.sort(row), row[wanted], side="right") for row in distances])


@dataclass(frozen=True)
class Recall:
    """Shares of images whose concept is found, and their binomial standard errors."""

    r1: float
    r10: float
    r1_error: float
    r10_error: float
    median_rank: float

    @classmethod
    def of(cls, ranks: Int[np.ndarray, " n"], n: int | None = None) -> "Recall":
        """Of each image's rank; `n` is the number of images, where there are several ranks of each."""
        n = n or len(ranks)
        r1, r10 = (float((ranks <= k).mean()) for k in (1, 10))
        r1_error, r10_error = (math.sqrt(r * (1 - r) / n) for r in (r1, r10))
        return cls(r1, r10, r1_error, r10_error, float(np.median(ranks)))


@dataclass(frozen=True)
class Accuracy:
    """Concept accuracy of a model with its anchors, all of the same drawings."""

    n: int
    concepts: int
    gallery: int
    model: Recall
    upper: Recall
    """Of the real drawings themselves, through the autoencoder; the drawing that each was is in the gallery. This is
    what a model would have that drew every drawing exactly."""
    others: Recall
    """As `upper`, without the drawing that it was: that of another style must be the nearest. This says how well the
    features know concepts across styles."""
    lower: Recall
    """Of the model's images and the captions of the others: every other concept of the sample in turn."""

    @property
    def r1_ratio(self) -> float:
        """The model's R@1 as a share of the upper anchor's."""
        return self.model.r1 / self.upper.r1 if self.upper.r1 else math.nan

    @property
    def r10_ratio(self) -> float:
        """The model's R@10 as a share of the upper anchor's."""
        return self.model.r10 / self.upper.r10 if self.upper.r10 else math.nan

    def record(self) -> dict[str, Any]:
        """Everything, for JSON, with the name of the measure; a ratio to 0 is null."""
        ratios = {"r1_ratio": self.r1_ratio, "r10_ratio": self.r10_ratio}
        ratios = {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}
        return {"measure": MEASURE} | asdict(self) | ratios

    def table(self) -> str:
        """A few lines for people."""
        rows = {
            "real drawings, decoded": self.upper,
            "the same, own file left out": self.others,
            "model": self.model,
            "model, shuffled captions": self.lower,
        }
        lines = [f"{'':28}{'R@1':>15}{'R@10':>15}{'median rank':>13}"]
        for name, r in rows.items():
            one, ten = (f"{x:.3f} +- {e:.3f}" for x, e in ((r.r1, r.r1_error), (r.r10, r.r10_error)))
            lines.append(f"{name:28}{one:>15}{ten:>15}{r.median_rank:>13g}")
        lines.append(f"{'model / real, decoded':28}{self.r1_ratio:>15.3f}{self.r10_ratio:>15.3f}")
        lines.append(
            f"n {self.n}, among {self.gallery} drawings of {self.concepts} concepts; +- is the standard error."
        )
        return "\n".join(lines)


def images_for(
    pipe: Pipeline, drawings: Drawings, chosen: Int[np.ndarray, " n"], *, batch: int, seed: int = 0, **fields: Any
) -> tuple[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n h w 3"]]:
    """What the model draws for the captions of the chosen drawings, and they themselves through its autoencoder.

    Args:
        pipe: the model.
        drawings: all of the data.
        chosen: places of those that are asked for.
        batch: images made together.
        seed: of the first image; the next one has the next.
        fields: of requests, such as steps and guidance.
    """
    check_count("batch", batch)
    drawn, decoded = [], []
    for first in tqdm(range(0, len(chosen), batch), desc="Drawing", unit=" batches", disable=len(chosen) <= batch):
        part = chosen[first : first + batch]
        images = pipe([drawings.prompt(i) for i in part], seed=seed + first, **fields)
        height, width = images[0].shape[:2]
        real = [Image.fromarray(drawings.images[i]).resize((width, height), Image.Resampling.BICUBIC) for i in part]
        drawn.append(np.stack(list(images)))
        decoded.append(pipe.decode(pipe.encode(np.stack([np.asarray(image) for image in real]))))
    return np.concatenate(drawn), np.concatenate(decoded)


def concept_accuracy(
    gallery: Gallery,
    chosen: Int[np.ndarray, " n"],
    drawn: UInt8[np.ndarray, "n h w 3"],
    decoded: UInt8[np.ndarray, "n h2 w2 3"],
    features: FeaturesFn,
) -> Accuracy:
    """Looks up images of the chosen drawings' captions among all drawings.

    Args:
        gallery: of all drawings.
        chosen: places of those that were asked for.
        drawn: what the model drew for each one's caption.
        decoded: each of them itself, through the model's autoencoder.
        features: from images to features, those of the gallery.
    """
    wanted = gallery.concept[chosen]
    of_model = ranks(gallery.distances(features(drawn)), wanted)
    of_decoded = features(decoded)
    foreign: Bool[np.ndarray, "n n"] = wanted[:, None] != wanted
    return Accuracy(
        len(chosen),
        len(gallery.concepts),
        len(gallery.points),
        Recall.of(of_model.diagonal()),
        Recall.of(ranks(gallery.distances(of_decoded), wanted).diagonal()),
        Recall.of(ranks(gallery.distances(of_decoded, chosen), wanted).diagonal()),
        Recall.of(of_model[foreign], len(chosen)),
    )
