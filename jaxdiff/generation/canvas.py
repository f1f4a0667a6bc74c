"""The image that a request starts from, at the size that is drawn, with its mask; and how large the result is."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from jaxdiff.families import Family
from jaxdiff.generation.request import MAX_SIDE, Pixels, Request
from jaxdiff.io.images import outpaint_canvas, read_image, read_mask
from jaxdiff.io.images.decode import header_size

Size = tuple[int, int]
"""Width and height in pixels."""


class Canvas(NamedTuple):
    """What a request starts from."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: Float32[np.ndarray, "h w"] | None
    """1 is drawn anew, 0 is kept."""


def image_size(request: Request, family: Family, own: Size | None) -> Size:
    """Width and height of the request's result.

    Args:
        request: what is wanted.
        family: the model's family.
        own: the size that the model was trained at, if it says.

    Raises:
        ValueError: where nothing gives a size, or its sides do not fit the model.
    """
    if request.image is None:
        size = request.size or _of_latents(request, family) or _of_control(request, family, own) or own
        if size is None:
            raise ValueError("The model does not say at which size it was trained; give a size.")
    else:
        width, height = _canvas_size(request, family, own)
        left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
        times = request.latent_upscale
        size = left + width * times + right, top + height * times + bottom
        if request.size not in (None, size):
            raise ValueError(f"size is {request.size}, and the image is {size[0]}x{size[1]}; leave size out, or resize "
                             "the image.")  # fmt: skip
    assert not isinstance(size, str)
    check_size("The image" if request.image is not None else "size", size, family.factor)
    return size


def latent_shape(size: Size, family: Family) -> tuple[int, int, int]:
    """Height, width and channels of the latent of an image of this size."""
    return size[1] // family.factor, size[0] // family.factor, family.latent_channels


def canvas_of(request: Request, family: Family, own: Size | None) -> Canvas | None:
    """The request's image and mask at the size that is drawn, before `latent_upscale`; None without an image.

    Args:
        request: what is wanted.
        family: the model's family.
        own: the size that the model was trained at, if it says.

    Raises:
        ValueError: where a file cannot be read, or image and mask differ in size.
    """
    if request.image is None:
        return None
    size = _canvas_size(request, family, own)
    image, mask = pixels_of(request.image), None
    height, width = image.shape[:2]
    if request.mask is not None:
        if isinstance(request.mask, np.ndarray):
            if request.mask.shape != (height, width):
                raise ValueError(f"mask is {request.mask.shape[1]}x{request.mask.shape[0]} and the image "
                                 f"{width}x{height}; they must have the same size.")  # fmt: skip
            mask = request.mask
        else:
            mask = read_mask(request.mask, (width, height))
        if (width, height) != size:
            grey = np.round(255 * mask).astype(np.uint8)
            mask = fitted(np.repeat(grey[..., None], 3, axis=2), size)[..., 0].astype(np.float32) / 255
    image = fitted(image, size)
    if request.outpaint is not None:
        left, top, right, bottom = request.outpaint
        image, mask = outpaint_canvas(image, left, right, top, bottom)
    return Canvas(image, mask)


def control_images(request: Request, size: Size) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The request's control images, stretched to the size of the result as diffusers stretches them.

    Raises:
        ValueError: where a file cannot be read.
    """
    images = map(pixels_of, request.control_image)
    return [
        image
        if image.shape[1::-1] == size
        else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        for image in images
    ]


def depth_map(depth: Pixels, sides: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """A depth map at a latent's height and width, from -1 to 1; one that is the same everywhere is 0."""
    given = pixels_of(depth).mean(-1) if isinstance(depth, str | Path) else depth
    found = bicubic(np.asarray(given, np.float32), sides)
    low, high = found.min(), found.max()
    return np.zeros_like(found) if low == high else 2 * (found - low) / (high - low) - 1


def bicubic(image: Float32[np.ndarray, "h w"], sides: tuple[int, int]) -> Float32[np.ndarray, "h2 w2"]:
    """At another height and width by cubic convolution (Keys 1981, with a = -0.75, as PyTorch has it), which sees four
    pixels along each side, however many there are."""
    for axis, n in enumerate(sides):
        size = image.shape[axis]
        if size == n:
            continue
        places = (np.arange(n) + 0.5) * size / n - 0.5
        first = np.floor(places).astype(int)
        weights = np.zeros((n, size))
        for k in range(-1, 3):
            away = np.abs(places - (first + k))
            near = (1.25 * away - 2.25) * away**2 + 1
            far = -0.75 * (((away - 5) * away + 8) * away - 4)
            np.add.at(weights, (np.arange(n), np.clip(first + k, 0, size - 1)), np.where(away <= 1, near, far))
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis).astype(np.float32)
    return image


def check_size(name: str, size: Size, factor: int, whose: str = "the model's factor") -> None:
    """Both sides must be above 0, multiples of `factor`, and not beyond `MAX_SIDE`.

    Raises:
        ValueError: where one is not.
    """
    width, height = size
    if min(size) < factor or width % factor or height % factor:
        raise ValueError(f"{name} is {width}x{height}; both sides must be multiples of {factor}, {whose}.")
    if max(size) > MAX_SIDE:
        raise ValueError(f"{name} is {width}x{height}; a side may have at most {MAX_SIDE} pixels.")


def fitted(image: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image at another width and height; of another aspect, its middle."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    across = min(width, height * size[0] / size[1])
    down = min(height, width * size[1] / size[0])
    left, top = (width - across) / 2, (height - down) / 2
    box = left, top, left + across, top + down
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, box=box))


def fitted_size(size: Size, family: Family, own: Size | None) -> Size:
    """The size at which a model draws from an image of this size: the shorter side is the model's own, if it says, and
    both are multiples of what the denoiser halves to whole numbers."""
    scale = min(own or size) / min(size)
    width, height = (max(1, round(side * scale / family.grain)) * family.grain for side in size)
    return width, height


def _canvas_size(request: Request, family: Family, own: Size | None) -> Size:
    """The size at which the image is taken: an array's own; a file's is made to fit. One that the model enlarges is
    taken as it is, and drawn at this size."""
    assert request.image is not None
    size = _size_of(request.image)
    if family.beside == "small image":
        return size[0] * family.factor, size[1] * family.factor
    if request.upscale is not None or request.latent_upscale > 1:
        times = request.upscale or 1
        return size[0] * times, size[1] * times
    if isinstance(request.image, np.ndarray):
        return size
    chosen = request.size or fitted_size(size, family, own)
    assert not isinstance(chosen, str)
    return chosen


def _size_of(image: Pixels) -> Size:
    """Width and height of an image, of a file by its header."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    size = _header(str(image), _changed(str(image)))
    return size if all(size) else pixels_of(image).shape[1::-1]  # which says what is wrong with the file


def _of_control(request: Request, family: Family, own: Size | None) -> Size | None:
    """The size of the first control image, of a file as it is made to fit."""
    if not request.control_image:
        return None
    image = request.control_image[0]
    size = _size_of(image)
    return size if isinstance(image, np.ndarray) else fitted_size(size, family, own)


def _of_latents(request: Request, family: Family) -> Size | None:
    if request.latents is None:
        return None
    return request.latents.shape[1] * family.factor, request.latents.shape[0] * family.factor


def pixels_of(image: Pixels) -> UInt8[np.ndarray, "h w 3"]:
    """An image's pixels, of a file as they are read.

    Raises:
        ValueError: where it cannot be read.
    """
    return image if isinstance(image, np.ndarray) else read_image(image)


@lru_cache(10_000)
def _header(path: str, changed: int) -> Size:
    return header_size(Path(path))


def _changed(path: str) -> int:
    """When the file was last written; 0 where there is none, which reading it then tells."""
    try:
        return Path(path).stat().st_mtime_ns
    except (OSError, ValueError):
        return 0
