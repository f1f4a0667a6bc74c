"""Pictures on disk: they say how they were made, never overwrite, and a user's bad ones are refused."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.images import contact_sheet, read_image, read_settings, slug, webui_parameters, write_png

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
    np.testing.assert_array_equal(read_image(path), image)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as png:
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


def test_every_kind_of_picture_is_read_as_eight_bit_colour(tmp_path):
    grey = np.linspace(0, 255, 16, dtype=np.uint8).reshape(4, 4)
    rgb = np.stack([grey] * 3, -1)
    for name, picture, expected in [
        ("grey.png", Image.fromarray(grey), rgb),
        ("deep.png", Image.fromarray(grey.astype(np.uint16) * 257), rgb),
        ("palette.gif", Image.fromarray(grey).convert("P"), rgb),
        ("alpha.png", Image.fromarray(np.dstack([rgb, grey])), np.dstack([rgb, grey])),
        ("cmyk.tif", Image.fromarray(rgb).convert("CMYK"), rgb),
    ]:
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name), expected, err_msg=name)


def test_a_photo_is_turned_upright(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (6, 4, 3)


def test_bad_pictures_are_refused_by_name(tmp_path, image):
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "webp", "gif"):
        path = tmp_path / f"half.{ending}"
        Image.fromarray(big).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"half.{ending} is (damaged|not a picture)"):
            read_image(path)
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"text\.png is not a picture"):
        read_image(tmp_path / "text.png")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"a\.eps is not a picture"):
        read_image(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="8 x 6 pixels, more than 40"):
        read_image(write_png(tmp_path, "small", image), max_pixels=40)


@pytest.mark.parametrize("side", [10_000, 16_000])
def test_a_small_file_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match="pixels"):
        read_image(tmp_path / "bomb.png")
