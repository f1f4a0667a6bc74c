"""Masks for inpainting and outpainting: 1 is drawn anew, 0 is kept."""

import math
import operator
from typing import SupportsFloat

import numpy as np
from jaxtyping import Float, Float32, UInt8

MAX_SIDE = 8192


def feathered(mask: Float[np.ndarray, "h w"], radius: SupportsFloat) -> Float32[np.ndarray, "h w"]:
    """The mask with soft edges: still 0 wherever it is 0, rising smoothly to its own value `radius` pixels inside.

    What is kept stays exactly as it is, therefore. The image's borders are no edges.

    Args:
        mask: in [0, 1].
        radius: 0 or more, in pixels; 0 changes nothing.

    Raises:
        ValueError: for a mask out of [0, 1], or a radius below 0 or not finite.
    """
    from scipy import ndimage  # here, since most who write images need no masks

    reach = float(radius)
    if not (math.isfinite(reach) and reach >= 0):
        raise ValueError(f"The radius is {radius}; it must be 0 or more, in pixels.")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("A mask's values must lie from 0 to 1.")
    mask = mask.astype(np.float32)
    if reach == 0 or (mask > 0).all():  # a mask without an edge has no distance to it
        return mask
    # Pixels beside the edge are 1 away from it.
    distance = np.asarray(ndimage.distance_transform_edt(mask > 0))
    t = np.clip(distance / (reach + 1), 0, 1)
    return (mask * (t * t * (3 - 2 * t))).astype(np.float32)


def outpaint_canvas(
    image: UInt8[np.ndarray, "h w 3"], left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[UInt8[np.ndarray, "h2 w2 3"], Float32[np.ndarray, "h2 w2"]]:
    """A larger image, its edges continued outwards, and the mask of what is new: 1 there, 0 on the old part.

    Args:
        image: the image.
        left: pixels to add on this side, as on the others.
        right: as left.
        top: as left.
        bottom: as left.

    Raises:
        ValueError: where a number is not whole or below 0, all are 0, or a side grows beyond 8192 pixels.
    """
    added = {}
    for side, n in {"left": left, "right": right, "top": top, "bottom": bottom}.items():
        try:
            added[side] = -1 if isinstance(n, bool) else operator.index(n)
        except TypeError:
            added[side] = -1
        if added[side] < 0:
            raise ValueError(f"{side} is {n!r}; it must be a whole number of pixels, 0 or more.")
    if not any(added.values()):
        raise ValueError("Nothing is added to the image; give left, right, top or bottom some pixels.")
    around = (added["top"], added["bottom"]), (added["left"], added["right"])
    height, width = (side + sum(new) for side, new in zip(image.shape, around, strict=False))
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"The image would be {width}x{height}; a side may have {MAX_SIDE} pixels at most.")
    mask = np.pad(np.zeros(image.shape[:2], np.float32), around, constant_values=1)
    return np.pad(image, (*around, (0, 0)), mode="edge"), mask
