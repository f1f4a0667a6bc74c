"""Images into files that say how they were made and never overwrite others."""

import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, PngImagePlugin

JSON_CHUNK = "jaxdiff"
"""The PNG text chunk that holds the settings as JSON."""
JSON_MARK = "jaxdiff: "
"""What comes before that JSON in the ImageDescription of a JPEG or WebP."""

FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""The kinds of files that images are written as, and their endings."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}
_MAX_EXIF = 65_533 - 6  # a JPEG's segment says its length in 16 bits


def slug(text: str, length: int = 60) -> str:
    """A file name's stem from any text: lower-case ASCII words joined by hyphens, "image" when none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower())[:length].strip("-") or "image"


def write_image(
    folder: Path | str,
    stem: str,
    image: UInt8[np.ndarray, "h w 3"],
    settings: Mapping[str, Any] | None = None,
    format: str = "png",
) -> Path:
    """Writes `stem.png`, or `stem-2.png` and so on: a file that is there is never touched.

    Args:
        folder: made if it is not there.
        stem: the file name without its ending (see `slug`).
        image: the image.
        settings: how it was made (see `encode_image`); None leaves nothing in the file.
        format: one of `FORMATS`.

    Returns:
        The path of the new file.

    Raises:
        ValueError: for another format, when the folder cannot be made or written to, or the settings do not fit.
    """
    data = encode_image(image, settings, format)
    return _write_new(Path(folder), stem, FORMATS[format], data)


def write_png(
    folder: Path | str, stem: str, image: UInt8[np.ndarray, "h w 3"], settings: Mapping[str, Any] | None = None
) -> Path:
    """`write_image` as PNG."""
    return write_image(folder, stem, image, settings)


def encode_image(
    image: UInt8[np.ndarray, "h w 3"], settings: Mapping[str, Any] | None = None, format: str = "png"
) -> bytes:
    """An image as the bytes of a file.

    Args:
        image: the image.
        settings: how it was made, as JSON values (keys as `webui_parameters` takes them). A PNG has them in the text
            chunks `jaxdiff` (JSON) and `parameters` (the form that Stable Diffusion's web UIs read), a JPEG or WebP in
            the EXIF fields ImageDescription (JSON) and UserComment (the web UIs').
        format: one of `FORMATS`; "jpeg" and "webp" lose a little.

    Raises:
        ValueError: for another format, a side that the format cannot have, or settings too long for a JPEG.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
    options = dict(_OPTIONS[format])
    if settings is not None and format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", webui_parameters(settings))
        text.add_text(JSON_CHUNK, json.dumps(dict(settings)))
        options["pnginfo"] = text
    elif settings is not None:
        options["exif"] = _exif(settings)
    out = io.BytesIO()
    try:
        Image.fromarray(image).save(out, format, **options)
    except (OSError, ValueError) as error:  # the encoders' own limits
        height, width = image.shape[:2]
        raise ValueError(f"An image of {width}x{height} cannot be written as {format}: {error}.") from error
    return out.getvalue()


def write_gif(
    folder: Path | str, stem: str, frames: Sequence[UInt8[np.ndarray, "h w 3"]], seconds: SupportsFloat = 0.1
) -> Path:
    """Writes `stem.gif`, or `stem-2.gif` and so on, which plays the frames for ever.

    Args:
        folder: made if it is not there.
        stem: the file name without its ending.
        frames: at least one, of one size; each gets its own 256 colours.
        seconds: how long each is shown, 0.02 to 600, in hundredths.

    Raises:
        ValueError: for no frames, several sizes, other seconds, or a folder that cannot be written to.
    """
    if not len(frames):
        raise ValueError("A GIF needs at least one frame.")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"A GIF's frames must have one size, not {sorted({f.shape[:2] for f in frames})}.")
    if not 0.02 <= (shown := float(seconds)) <= 600:  # below, browsers slow down; far above, the field overflows
        raise ValueError(f"A GIF's frames are shown for {seconds} seconds; it must be 0.02 to 600.")
    first, *others = (Image.fromarray(np.asarray(frame)).quantize(256) for frame in frames)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=round(100 * shown) * 10, loop=0)
    return _write_new(Path(folder), stem, "gif", out.getvalue())


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


def _exif(settings: Mapping[str, Any]) -> bytes:
    exif = Image.Exif()
    exif.endian = ">"  # the web UIs read a UserComment's UTF-16 in this order, whatever the header says
    exif[ExifTags.Base.ImageDescription] = JSON_MARK + json.dumps(dict(settings))
    comment = b"UNICODE\0" + webui_parameters(settings).encode("utf-16-be", "replace")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if len(data := exif.tobytes()) > _MAX_EXIF:
        raise ValueError(f"The settings take {len(data)} bytes, and such an image holds {_MAX_EXIF}; write a PNG.")
    return data


def _write_new(folder: Path, stem: str, ending: str, data: bytes) -> Path:
    """Writes the first of `stem.ending`, `stem-2.ending` and so on that is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = 1
        while True:
            path = folder / (f"{stem}.{ending}" if n == 1 else f"{stem}-{n}.{ending}")
            try:
                file = path.open("xb")
            except FileExistsError:
                n += 1
                continue
            try:
                with file:
                    file.write(data)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}.") from error
