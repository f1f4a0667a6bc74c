"""What is read, and what is done to it on the way."""

import math
import re
from dataclasses import dataclass, replace

from jaxdiff.config.base import Checked, positive, require


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read, and what is done to each image on the way."""

    source: str = "emoji"
    """`emoji` (made by `python -m jaxdiff.tools.prepare emoji`), `prepared` (a collection that `python -m
    jaxdiff.tools.prepare collect` wrote), `folder` (images as they are), `latents`, or any TFDS data set's name."""
    root: str = "data"
    """The TFDS data directory, or the folder of images, of the prepared collection, or of the latents."""
    split: str = "train"
    heldout: str = "heldout"
    """TFDS only: the split that reconstructions are measured on; empty measures on `split`."""
    image_field: str = "image"
    """TFDS only: the feature that holds the image."""
    text_field: str = "caption"
    """TFDS: the feature that holds the caption or captions, or a class label (its name becomes the caption). Folders:
    the field of metadata.jsonl or metadata.csv; `caption` takes `text`, too, or what else is usual."""
    size: int = 64
    """Pixels along each side of the square crop; of other aspects, the square root of their area."""
    aspects: tuple[str, ...] = ()
    """Shapes of the crops, as width:height, such as 1:1 4:3 3:4 16:9: each image is cropped to the nearest, and each
    batch has one. Empty: squares."""
    side_multiple: int = 64
    """Sides of `aspects` are multiples of this many pixels; the VAE's factor times the UNet's divides it."""
    batch_size: int = 64
    """Global batch: images an optimiser step, over all hosts."""
    crop: float = 1.0
    """Smallest share of the shorter side that a random square crop may take; 1 crops nothing but to a square."""
    flip: bool = False
    """Mirror left and right half of the time."""
    resident: bool = False
    """Keep all records in the devices' memory, where batches are looked up: read once, each on all backgrounds that it
    may be drawn on, or as cached latents. The batches are the same. For whole images of one shape, and devices with
    room."""
    workers: int = 0
    """grain worker processes; 0 reads in the trainer's own threads."""
    max_bad_share: float = 0.01
    """Records that cannot be read are skipped and counted; a larger share than this stops the run."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of every shape that a batch can have, in the order of `aspects`."""
        if not self.aspects:
            return ((self.size, self.size),)
        roots = [math.sqrt(_aspect(text)) for text in self.aspects]
        return tuple((self._side(self.size / root), self._side(self.size * root)) for root in roots)

    def of_one_shape(self) -> "DataConfig":
        """The same with that one of its shapes which is nearest to a square, for evaluations."""
        if not self.aspects:
            return self
        ratios = [abs(math.log(width / height)) for height, width in self.shapes]
        return replace(self, aspects=(self.aspects[ratios.index(min(ratios))],))

    def _side(self, pixels: float) -> int:
        return max(1, round(pixels / self.side_multiple)) * self.side_multiple

    def _check(self) -> None:
        require(
            self.batch_size <= 2**24,
            f"DataConfig.batch_size is {self.batch_size}; more than {2**24} images a step are not planned for.",
        )
        positive(self, "size", "batch_size", "side_multiple")
        for text, shape in zip(self.aspects, self.shapes, strict=False):
            first = self.aspects[self.shapes.index(shape)]
            require(
                first == text,
                f"DataConfig.aspects {first!r} and {text!r} are both {shape[1]}x{shape[0]} pixels at size {self.size} "
                f"and side_multiple {self.side_multiple}; leave one out, or lower side_multiple.",
            )
        require(len(set(self.aspects)) == len(self.aspects), "DataConfig.aspects holds one aspect twice.")
        require(0 < self.crop <= 1, f"DataConfig.crop is {self.crop}; it must lie in (0, 1].")
        require(self.workers >= 0, f"DataConfig.workers is {self.workers}; it must not be negative.")
        require(
            0 <= self.max_bad_share < 1, f"DataConfig.max_bad_share is {self.max_bad_share}; it must lie in [0, 1)."
        )


def _aspect(text: str) -> float:
    """ "16:9" as width / height."""
    sides = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", text)
    ratio = float(sides[1]) / float(sides[2]) if sides and float(sides[2]) else 0
    require(1 / 16 <= ratio <= 16, f"DataConfig.aspects holds {text!r}; it must be width:height, such as 4:3, and "
            "neither side more than 16 times the other.")  # fmt: skip
    return ratio
