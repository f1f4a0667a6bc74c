"""What is read, and what is done to it on the way."""

from dataclasses import dataclass

from jaxdiff.config.base import Checked, positive, require


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read, and what is done to each picture on the way."""

    source: str = "emoji"
    """`emoji` (made by `python -m jaxdiff.tools.prepare emoji`), `folder`, `latents`, or any TFDS data set's name."""
    root: str = "data"
    """The TFDS data directory, the folder of pictures, or the latents file."""
    split: str = "train"
    heldout: str = "heldout"
    """TFDS only: the split that reconstructions are measured on; empty measures on `split`."""
    image_field: str = "image"
    """TFDS only: the feature that holds the picture."""
    text_field: str = "caption"
    """TFDS only: the feature that holds the caption, or a class label (its name becomes the caption)."""
    size: int = 64
    """Pixels along each side of the square crop."""
    batch_size: int = 64
    """Global batch: pictures an optimiser step, over all hosts."""
    crop: float = 1.0
    """Smallest share of the shorter side that a random square crop may take; 1 crops nothing but to a square."""
    flip: bool = False
    """Mirror left and right half of the time."""
    workers: int = 0
    """grain worker processes; 0 reads in the trainer's own threads."""
    max_bad_share: float = 0.01
    """Records that cannot be read are skipped and counted; a larger share than this stops the run."""

    def _check(self) -> None:
        positive(self, "size", "batch_size")
        require(0 < self.crop <= 1, f"DataConfig.crop is {self.crop}; it must lie in (0, 1].")
        require(self.workers >= 0, f"DataConfig.workers is {self.workers}; it must not be negative.")
        require(
            0 <= self.max_bad_share < 1, f"DataConfig.max_bad_share is {self.max_bad_share}; it must lie in [0, 1)."
        )
