"""Pictures on disk: they say how they were made, never overwrite."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.images import contact_sheet, read_settings, slug, webui_parameters, write_png

SETTINGS = {
    "prompt": "a red apple, 日本", "negative_prompt": "blurry", "steps": 30, "sampler": "ddim", "guidance": 7.5,
    "seed": 3, "width": 8, "height": 6, "model": "emoji",
}  # fmt: skip


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_a_png_gives_back_its_pixels_and_settings(tmp_path, image):
    path = write_png(tmp_path / "new" / "folder", "apple", image, SETTINGS)
    assert path.name == "apple.png"
    assert read_settings(path) == SETTINGS
    with Image.open(path) as png:
        np.testing.assert_array_equal(np.asarray(png), image)
        assert png.text["parameters"] == (
            "a red apple, 日本\nNegative prompt: blurry\n"
            "Steps: 30, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 8x6, Model: emoji"
        )


def test_values_that_would_break_the_webui_line_are_quoted():
    assert webui_parameters({"prompt": "x", "model": "a, b: c"}) == 'x\nModel: "a, b: c"'


def test_a_picture_without_settings_has_none(tmp_path, image):
    assert read_settings(write_png(tmp_path, "plain", image)) is None


def test_nothing_is_overwritten(tmp_path, image):
    (tmp_path / "a-2.png").write_bytes(b"mine")
    paths = [write_png(tmp_path, "a", image).name for _ in range(3)]
    assert paths == ["a.png", "a-3.png", "a-4.png"]
    assert (tmp_path / "a-2.png").read_bytes() == b"mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be written to: Not a directory"):
        write_png(tmp_path / "file" / "out", "a", image)


@pytest.mark.parametrize(
    ("text", "stem"),
    [("A red apple, 3D!", "a-red-apple-3d"), ("Ünïcode", "unicode"), ("日本", "image"), ("../../etc", "etc"),
     ("x" * 99, "x" * 60)],
)  # fmt: skip
def test_any_text_gives_a_safe_file_name(text, stem):
    assert slug(text) == stem


def test_a_contact_sheet_holds_every_picture_unscathed(image):
    images = [image, 255 - image, image // 2]
    bare = contact_sheet(images, columns=2, cell=8)
    assert sum(np.array_equal(bare[y : y + 6, x : x + 8], one) for one in images
               for y in range(bare.shape[0] - 5) for x in range(bare.shape[1] - 7)) == 3  # fmt: skip
    captioned = contact_sheet(images, ["short", "a long caption " * 20, ""], columns=2)
    big = images[1].repeat(20, 0).repeat(20, 1)
    assert np.array_equal(captioned[5 : 5 + 120, 5 + 165 : 5 + 165 + 160], big)
    ink = (captioned[125:, 5:165] < 128).any()
    assert ink


def test_a_contact_sheet_that_makes_no_sense_is_refused(image):
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([image, image[:4]])
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        contact_sheet([image], ["a", "b"])


def test_settings_are_read_from_pngs_only(tmp_path):
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a PNG"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        read_settings(tmp_path / "gone.png")
