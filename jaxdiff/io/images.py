"""Pictures: PNGs that say how they were made and never overwrite, contact sheets, and users' files read with care."""

import io
import json
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
_JSON_CHUNK = "jaxdiff"


def slug(text: str, length: int = 60) -> str:
    """A file name's stem from any text: lower-case ASCII words joined by hyphens, "image" when none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower())[:length].strip("-") or "image"


def write_png(
    folder: Path | str, stem: str, image: UInt8[np.ndarray, "h w 3"], settings: Mapping[str, Any] | None = None
) -> Path:
    """Writes `stem.png`, or `stem-2.png` and so on: a file that is there is never touched.

    Args:
        folder: made if it is not there.
        stem: the file name without its ending (see `slug`).
        image: the picture.
        settings: how it was made, as JSON values (keys as `webui_parameters` takes them); goes into the text chunks
            `jaxdiff` (JSON) and `parameters` (the form that Stable Diffusion's web UIs read).

    Returns:
        The path of the new file.

    Raises:
        ValueError: when the folder cannot be made or written to.
    """
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("parameters", webui_parameters(settings))
        text.add_text(_JSON_CHUNK, json.dumps(dict(settings)))
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG", pnginfo=text)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = 1
        while True:
            path = folder / (f"{stem}.png" if n == 1 else f"{stem}-{n}.png")
            try:
                file = path.open("xb")
            except FileExistsError:
                n += 1
                continue
            try:
                with file:
                    file.write(png.getbuffer())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}.") from error


def webui_parameters(settings: Mapping[str, Any]) -> str:
    """The `parameters` text of Stable Diffusion's web UIs.

    Reads `prompt`, `negative_prompt`, `steps`, `sampler`, `guidance`, `seed`, `width`, `height` and `model`, each if
    it is there.
    """
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    names = {"steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale", "seed": "Seed"}
    pairs = [(label, settings[name]) for name, label in names.items() if name in settings]
    if "width" in settings and "height" in settings:
        pairs.append(("Size", f"{settings['width']}x{settings['height']}"))
    if "model" in settings:
        pairs.append(("Model", settings["model"]))
    # A value with a comma, colon or newline is quoted, as the web UIs do.
    told = ((label, json.dumps(v, ensure_ascii=False) if re.search(r"[,:\n]", v := str(value)) else v)
            for label, value in pairs)  # fmt: skip
    return "\n".join([*lines, ", ".join(f"{label}: {value}" for label, value in told)])


def read_settings(path: Path | str) -> dict[str, Any] | None:
    """The settings that `write_png` put into a PNG; None for a picture that carries none.

    Raises:
        ValueError: when the file is no picture, or its settings are damaged.
    """
    with _open(Path(path)) as image:
        text = image.info.get(_JSON_CHUNK)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} carries settings that are not JSON: {error}.") from error


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    captions: Sequence[str] = (),
    columns: int | None = None,
    cell: int = 160,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pictures of one size in rows on white, each over its caption.

    Args:
        images: at least one.
        captions: as many, or none; long ones are wrapped, and cut after three lines.
        columns: pictures in a row; None makes the sheet about square.
        cell: pictures narrower than this are enlarged by a whole factor, so that captions fit and pixels stay square.

    Raises:
        ValueError: when there is no picture, sizes differ, or there are fewer or more captions than pictures.
    """
    if not len(images):
        raise ValueError("A contact sheet needs at least one image.")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"A contact sheet's images must have one size, not {sorted({i.shape[:2] for i in images})}.")
    if captions and len(captions) != len(images):
        raise ValueError(f"There are {len(images)} images but {len(captions)} captions.")
    h, w = images[0].shape[:2]
    zoom = max(1, cell // w)
    h, w = h * zoom, w * zoom
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)

    font_size = max(10, w // 14)
    font = ImageFont.load_default(font_size)
    gap, line = max(4, w // 32), font_size + 3
    letters = max(4, int(w / font.getlength("abcdefghij nopqrs tu") * 20))
    wrapped = [textwrap.wrap(c, letters, max_lines=3, placeholder="...") for c in captions]
    text_height = line * max(map(len, wrapped), default=0)

    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + text_height + gap)
        sheet.paste(Image.fromarray(np.asarray(image)).resize((w, h), Image.Resampling.NEAREST), (x, y))
        for j, words in enumerate(wrapped[i] if wrapped else ()):
            draw.text((x, y + h + j * line), words, "black", font)
    return np.asarray(sheet)


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w c"]:
    """A user's picture, decoded to the last pixel: upright, 8 bits, with 3 channels, or 4 where it has transparency.

    An animation gives its first frame.

    Raises:
        ValueError: when the file is missing, damaged, cut short, of an unknown kind, or has more than `max_pixels`.
    """
    path = Path(path)
    with _open(path) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels, more than {max_pixels}; make it smaller."
            )
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            transparent = image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info
            return np.array(image.convert("RGBA" if transparent else "RGB"))
        except Exception as error:  # decoders meet damage with whatever comes to hand
            raise ValueError(f"{path} is damaged or cut short ({error}).") from error


def _open(path: Path) -> Image.Image:
    """The picture's header; only well-known formats, since Pillow's rarer readers run other programs."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return Image.open(path, formats=_FORMATS)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels; make it smaller.") from error
    except Exception as error:  # as above
        raise ValueError(f"{path} is not a picture that can be read; supported: {', '.join(_FORMATS)}.") from error
