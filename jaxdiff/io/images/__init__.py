"""Images on disk and beside each other: reading what is not trusted, writing what says how it was made."""

from jaxdiff.io.images.masks import feathered, outpaint_canvas
from jaxdiff.io.images.read import read_bytes, read_image, read_mask, read_settings
from jaxdiff.io.images.sheets import SHEET, STEPS, contact_sheet, film_strip, is_sheet
from jaxdiff.io.images.write import FORMATS, encode_image, slug, webui_parameters, write_gif, write_image, write_png

__all__ = [
    "FORMATS",
    "SHEET",
    "STEPS",
    "contact_sheet",
    "encode_image",
    "feathered",
    "film_strip",
    "is_sheet",
    "outpaint_canvas",
    "read_bytes",
    "read_image",
    "read_mask",
    "read_settings",
    "slug",
    "webui_parameters",
    "write_gif",
    "write_image",
    "write_png",
]
