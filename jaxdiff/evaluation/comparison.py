"""All that can be said of two sets of images by a network's features, as one record and one table."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from jaxdiff.evaluation import frechet, mmd, two_sample
from jaxdiff.evaluation.blocks import check_sets
from jaxdiff.evaluation.extractor import Extractor, Seen
from jaxdiff.evaluation.features import CLIP
from jaxdiff.evaluation.neighbours import DENSITY_BALL, support
from jaxdiff.evaluation.pixel_adversary import pixel_test
from jaxdiff.evaluation.pixels import SpectrumSum, psnr, ssim
from jaxdiff.evaluation.scores import clip_score, inception_score
from jaxdiff.evaluation.sets import ImageSet, Pixels

Pairs = Literal["none", "prompts", "copies"]
"""Whether image i of both sets has one prompt, or is even a copy of the other."""
MOST_EXACT = 10_000
"""Pictures of a set up to which KID is of all pairs, which takes minutes beyond."""
MOST_TOLD_APART = 2000
"""Pictures of each set for the adversary."""
LEAST = 20
"""Pictures of each set, below which no number says anything."""


@dataclass(frozen=True)
class Row:
    """A measure of A against B."""

    name: str
    value: float
    error: float | None = None
    """Its standard error."""
    p: float | None = None
    """How often chance alone has as much."""
    note: str = ""

    def line(self) -> str:
        """For people."""
        value = f"{self.value:.4g}" + ("" if self.error is None else f" +- {1.96 * self.error:.2g}")
        p = "" if self.p is None else f"{self.p:.4f}"
        return f"{self.name:26}{value:>22}{p:>9}  {self.note}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """Measures of A, which is judged, against B, which is taken for real."""

    a: str
    b: str
    count_a: int
    count_b: int
    features: str
    """The network, its weights, the size and the resizing rule: without them no number means anything."""
    dimensions: int
    pairs: Pairs
    rows: list[Row] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; what is no number is null."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not np.isfinite(value) else value

        rows = [{name: plain(value) for name, value in asdict(row).items()} for row in self.rows]
        return asdict(self) | {"rows": rows}

    def table(self) -> str:
        """A few lines for people."""
        head = [
            f"A: {self.a}, {self.count_a} images; B: {self.b}, {self.count_b} images",
            f"features: {self.features}, {self.dimensions} dimensions",
            f"{'':26}{'value (+- 95 %)':>22}{'p':>9}",
        ]
        return "\n".join(head + [row.line() for row in self.rows])


def compare(
    a: ImageSet,
    b: ImageSet,
    look: Extractor,
    *,
    pairs: Pairs = "none",
    dimensions: int | None = None,
    bootstrap: int = 20,
    pixels: bool = False,
    seed: int = 0,
) -> Comparison:
    """Looks at both sets and measures A against B.

    Args:
        a: what is judged.
        b: what is taken for real.
        look: from images to features.
        pairs: whether image i of both sets has one prompt, or one is the other's copy.
        dimensions: principal components of B that the Frechet distance is measured in; all if None.
        bootstrap: replicates for the Frechet distance's standard errors; 0 leaves them out, which saves most of the
            time where there are many images.
        pixels: also trains a network to tell the images apart, for which they must have one size.
        seed: of splits, permutations and what else is left to chance.

    Raises:
        ValueError: where sets are too small, or do not fit together.
    """
    for one, name in ((a, "A"), (b, "B")):
        if one.count < LEAST:
            raise ValueError(f"{name}, {one.name}, has {one.count} images; fewer than {LEAST} say nothing.")
    if pairs != "none" and a.count != b.count:
        raise ValueError(f"A has {a.count} images and B {b.count}; pairs of {pairs} need as many of both.")
    seen_a, spectrum_a = _look(a, look)
    seen_b, spectrum_b = _look(b, look)
    width = seen_a.features.shape[1]
    out = Comparison(a.name, b.name, a.count, b.count, look.title, width, pairs)
    out.rows.extend(measures(seen_a, seen_b, pairs=pairs, dimensions=dimensions, bootstrap=bootstrap, seed=seed))
    if look.name == CLIP:
        found = mmd.cmmd(seen_a.features, seen_b.features)
        out.rows.append(Row("CMMD", found, note="times 1000, biased, as the paper has it"))
    if look.texts is not None:
        for name, images, seen in (("A", a, seen_a), ("B", b, seen_b)):
            if images.prompts is not None:
                out.rows.append(_text_row(name, clip_score(seen.features, look.texts(images.prompts))))
    if spectrum_a and spectrum_b:
        share = spectrum_a.result().top_octave / max(spectrum_b.result().top_octave, 1e-30)
        note = "" if spectrum_a.size == spectrum_b.size else "; the sizes differ, so do these waves"
        out.rows.append(Row("power of fine waves, A/B", share, note=f"1/4 to 1/2 cycles a pixel{note}"))
    if pairs == "copies":
        out.rows.extend(_copies(a, b))
    if pixels:
        out.rows.append(_pixel_row(a, b, pairs != "none", seed))
    return out


def measures(
    a: Seen, b: Seen, *, pairs: Pairs = "none", dimensions: int | None = None, bootstrap: int = 20, seed: int = 0
) -> Iterator[Row]:
    """All measures of features, one after another; arguments as in `compare`."""
    x, y = a.features, b.features
    check_sets(x, y, LEAST)
    yield from _frechet_rows(x, y, dimensions, bootstrap, seed)
    yield from _kid_rows(x, y, pairs != "none", seed)
    found = support(x, y)
    notes = {
        "precision": "of A, near images of B",
        "recall": "of B, near images of A",
        "density": f"as precision, by balls of {DENSITY_BALL}",
        "coverage": "of B, those that A comes near to",
    }
    for name, note in notes.items():
        yield Row(name, getattr(found, name), note=note)
    if a.logits is not None and b.logits is not None:
        order = np.random.default_rng(seed)
        for name, logits in (("A", a.logits), ("B", b.logits)):
            score = inception_score(order.permutation(logits))
            yield Row(f"inception score of {name}", score.mean, note=f"over 10 splits +- {score.deviation:.2g}")
    yield from _adversary_rows(x, y, pairs != "none", seed)


def _frechet_rows(x: np.ndarray, y: np.ndarray, dimensions: int | None, bootstrap: int, seed: int) -> Iterator[Row]:
    if dimensions is not None:
        project = frechet.principal(y, dimensions)
        x, y = project(x), project(y)
    n, width = min(len(x), len(y)), x.shape[1]
    name = "FD" if dimensions is None else f"FD, {dimensions} components"
    line = frechet.frechet_infinity(x, y, seed)
    error = limit_error = None
    if bootstrap > 1:
        error, limit_error = frechet.standard_errors(_distance_and_limit, x, y, bootstrap, seed)
    yield Row(name, frechet.frechet(x, y), error, note=f"of {len(x)} and {len(y)} images")
    floor = frechet.above_floor(x, y, seed)
    yield Row(f"{name}, n = {floor.count}", floor.distance)
    yield Row("its floor, B against B", floor.floor, note=f"n = {floor.count}")
    trusted = "" if n >= 5 * width else f"; not to be trusted: {n} images for {width} dimensions are too few"
    yield Row(f"{name}, n to infinity", line.infinity, limit_error, note=f"line from n = {line.sizes[0]}{trusted}")


def _distance_and_limit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """With a line of few points: its limit spreads hardly more, and each point costs as much as the distance."""
    line = frechet.frechet_infinity(x, y, points=5)
    return line.distances[-1] if len(x) == len(y) else frechet.frechet(x, y), line.infinity


def _kid_rows(x: np.ndarray, y: np.ndarray, paired: bool, seed: int) -> Iterator[Row]:
    test = mmd.permutation_test(x, y, mmd.polynomial(x.shape[1]), paired=paired, seed=seed)
    tested = f"p of {test.count}"
    if max(len(x), len(y)) <= MOST_EXACT:
        yield Row("KID", mmd.kid(x, y), test.error, test.p, f"of all pairs, not times 1000; {tested}")
    else:
        found = mmd.kid_by_subsets(x, y, seed=seed)
        note = f"{mmd.SUBSETS} subsets of {mmd.SUBSET_SIZE}, not times 1000; {tested}"
        yield Row("KID", found.mean, test.error, test.p, note)


def _adversary_rows(x: np.ndarray, y: np.ndarray, paired: bool, seed: int) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    n = min(len(x), len(y), MOST_TOLD_APART)
    order = rng.permutation(min(len(x), len(y)))[:n]
    x, y = (x[order], y[order]) if paired else (s[rng.permutation(len(s))[:n]] for s in (x, y))
    for name, test in (
        ("told apart by 1-NN", two_sample.nearest_neighbour_test),
        ("told apart by regression", two_sample.logistic_test),
    ):
        yield _told_apart(name, test(x, y, paired=paired, seed=seed))
    test = mmd.mmd_test(x, y, paired=paired, seed=seed)
    yield Row("MMD, sigma learnt", test.statistic, test.error, test.p, f"on {test.count} of each")


def _text_row(name: str, scores: np.ndarray) -> Row:
    error = float(scores.std(ddof=1)) / len(scores) ** 0.5
    return Row(f"CLIP score of {name}", float(scores.mean()), error, note="2.5 times the cosine of image and text")


def _told_apart(name: str, found: two_sample.Verdict) -> Row:
    least = two_sample.detectable(found.tested)
    auc = "" if np.isnan(found.auc) else f"AUC {found.auc:.3f}; "
    note = f"accuracy on {found.tested}; {auc}{least:.2f} would be found in 8 of 10 tries"
    return Row(name, found.accuracy, None, found.p, note)


def _pixel_row(a: ImageSet, b: ImageSet, paired: bool, seed: int) -> Row:
    """Of the first images of each, which are read once more."""
    n = min(a.count, b.count, MOST_TOLD_APART)
    sets = []
    for images in (a, b):
        found = [images.image(i) for i in range(n)]
        if len(sizes := {image.shape for image in found}) > 1:
            raise ValueError(f"{images.name} has images of {len(sizes)} sizes; the network on pixels needs one size.")
        sets.append(np.stack(found))
    return _told_apart("told apart by pixels", pixel_test(*sets, paired=paired, seed=seed))


def _look(images: ImageSet, look: Extractor) -> tuple[Seen, SpectrumSum | None]:
    """What the network sees, and the spectrum where all images have one size of 8 pixels or more."""
    total: SpectrumSum | None = None
    one_size = True

    def passing() -> Iterator[Pixels]:
        nonlocal total, one_size
        for image in images:
            size = image.shape[:2]
            if total is None and min(size) >= 8:
                total = SpectrumSum(*size)
            one_size = one_size and total is not None and total.size == size
            if total is not None and one_size:
                total.add(image)
            yield image

    seen = look.look(passing(), images.count)
    return seen, total if one_size else None


def _copies(a: ImageSet, b: ImageSet) -> Iterator[Row]:
    def values(of: Any) -> np.ndarray:
        return np.array([of(x[None], y[None])[0] for x, y in zip(a, b, strict=True)])

    ratios = values(psnr)
    equal = int(np.isinf(ratios).sum())
    if equal < len(ratios):
        note = f"dB{f', without {equal} that are equal' if equal else ''}"
        yield Row("PSNR", float(ratios[np.isfinite(ratios)].mean()), note=note)
    yield Row("SSIM", float(values(ssim).mean()))
