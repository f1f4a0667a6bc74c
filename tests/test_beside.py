"""Models that read an image to edit, or a depth map. What diffusers draws: tests/parity/test_kinds.py."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.generation.canvas import bicubic, depth_map

ASKED = {"steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def editor():
    return jaxdiff.Pipeline(tiny.model(denoiser=replace(tiny.UNET, in_channels=8)))


@pytest.fixture(scope="module")
def by_depth():
    return jaxdiff.Pipeline(tiny.model(denoiser=replace(tiny.UNET, in_channels=5)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


@pytest.mark.slow
def test_each_image_is_edited_by_itself(editor, images):
    together = editor(["a dog", "a red apple"], image=images, seed=4, **ASKED)
    alone = [editor(prompt, image=image, seed=4 + i, **ASKED)[0]
             for i, (prompt, image) in enumerate(zip(["a dog", "a red apple"], images, strict=True))]  # fmt: skip
    assert tiny.off(together, np.stack(alone)) <= 1
    assert tiny.off(together, editor(["a dog", "a red apple"], image=images[::-1], seed=4, **ASKED)) > 2


def test_the_images_guidance_is_a_number_that_compiles_nothing(editor, images):
    plain = editor("a dog", image=images[0], **ASKED)
    np.testing.assert_array_equal(editor("a dog", image=images[0], image_guidance=1.5, **ASKED), plain)
    assert tiny.off(editor("a dog", image=images[0], image_guidance=5.0, **ASKED), plain) > 2
    assert tiny.off(editor("a dog", image=images[0], image_guidance=5.0, pag_scale=2.0, **ASKED), plain) > 2


def test_depth_is_followed_whatever_its_range(by_depth):
    depth = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    one = by_depth("a dog", depth=depth, **ASKED)
    assert tiny.off(by_depth("a dog", depth=3000 + 500 * depth, **ASKED), one) <= 1
    assert tiny.off(by_depth("a dog", depth=-depth, **ASKED), one) > 2
    np.testing.assert_array_equal(by_depth(["a dog"], depth=depth[None], **ASKED), one)


def test_a_depth_map_that_is_the_same_everywhere_is_0():
    np.testing.assert_array_equal(depth_map(np.full((5, 7), 3.0, np.float32), (8, 8)), np.zeros((8, 8)))


def test_cubic_convolution_keeps_lines_and_constants():
    line = np.arange(12, dtype=np.float32)[None].repeat(3, 0)
    wide = bicubic(line, (3, 24))
    np.testing.assert_allclose(wide[:, 4:-4], ((np.arange(24) + 0.5) / 2 - 0.5)[None, 4:-4].repeat(3, 0), atol=0.05)
    np.testing.assert_allclose(bicubic(np.full((4, 5), 2.5, np.float32), (9, 3)), np.full((9, 3), 2.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "edits an image"),
        ({"image": True, "mask": True}, "leave out mask"),
        ({"image": True, "strength": 0.5}, "leave out strength"),
        ({"image": True, "upscale": 2}, "leave out upscale"),
        ({"image": True, "image_guidance": 0.5}, "image_guidance is 0.5"),
        ({"image": True, "depth": True}, "this one does not"),
    ],
)
def test_what_does_not_go_with_editing_is_refused(editor, images, fields, words):
    values = {"image": images[0], "mask": np.ones((16, 16)), "depth": np.ones((4, 4))}
    given = {name: values[name] if value is True else value for name, value in fields.items()}
    with pytest.raises(ValueError, match=words):
        editor("a dog", **given, **ASKED)


def test_what_other_models_do_not_read_is_refused(by_depth, images):
    with pytest.raises(ValueError, match="give it as depth"):
        by_depth("a dog", **ASKED)
    with pytest.raises(ValueError, match="finite numbers"):
        by_depth("a dog", depth=np.full((4, 4), np.nan), **ASKED)
    plain = jaxdiff.Pipeline(tiny.model())
    for fields in ({"depth": np.ones((4, 4))}, {"image": images[0], "image_guidance": 2.0}):
        with pytest.raises(ValueError, match="leave it out"):
            plain("a dog", **fields, **ASKED)
