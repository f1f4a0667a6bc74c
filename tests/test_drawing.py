"""Where requests meet a model: sizes, steps and strengths that follow, and what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxdiff.config import SchedulerConfig
from jaxdiff.generation.canvas import canvas_of, fitted, fitted_size
from jaxdiff.generation.drawing import ModelInfo, checked_defaults, make_drawing, settled
from jaxdiff.generation.request import Request

PHOTO = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
WIDE = np.zeros((16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def info(model):
    return ModelInfo(
        model.modules(), model.scheduler, model.size, np.float32, checked_defaults(model.defaults, model.scheduler)
    )


def met(info, *requests, **fields):
    requests = requests or (Request(**fields),)
    return make_drawing([one if one.seed is not None else replace(one, seed=0) for one in requests], info)


@pytest.mark.parametrize(("size", "expected"), [((16, 16), (16, 16)), ((100, 50), (32, 16)), ((30, 400), (16, 212)),
                                                ((8, 8), (16, 16))])  # fmt: skip
def test_a_files_shorter_side_becomes_the_models_own_and_both_what_the_denoiser_halves(info, size, expected):
    assert fitted_size(size, info.family, info.size) == expected
    assert fitted(np.zeros((*size[::-1], 3), np.uint8), expected).shape == (*expected[::-1], 3)


def test_a_picture_of_another_aspect_is_cut_to_its_middle():
    left, middle, right = (np.full((8, 4, 3), value, np.uint8) for value in (0, 100, 200))
    square = fitted(np.hstack([left, middle, middle, right]), (4, 4))
    assert np.abs(square.astype(int) - 100).max() < 10, "Lanczos' filter overshoots at the edges"


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (8, 8, 4)),
        ({"size": (24, 16)}, (8, 12, 4)),
        ({"latents": np.zeros((5, 7, 4))}, (5, 7, 4)),
        ({"image": WIDE}, (8, 12, 4)),
        ({"image": WIDE, "outpaint": (2, 4, 6, 8)}, (14, 16, 4)),
        ({"image": WIDE, "upscale": 2}, (16, 24, 4)),
        ({"image": WIDE, "latent_upscale": 3}, (24, 36, 4)),
    ],
)
def test_the_size_is_what_is_asked_for_or_the_images_or_the_latents_or_the_models(info, fields, shape):
    assert met(info, **fields).shape == shape


def test_a_files_mask_is_fitted_as_its_image_is(info, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    mask = np.zeros((40, 70), np.uint8)
    mask[:, 35:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    request = Request(image=str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"))
    small, drawn = canvas_of(request, info.family, info.size)
    assert small.shape == (16, 28, 3)
    np.testing.assert_array_equal(small, fitted(image, (28, 16)))
    np.testing.assert_array_equal(drawn[:, :11], 0)
    np.testing.assert_array_equal(drawn[:, 17:], 1)
    by_array = canvas_of(replace(request, mask=mask), info.family, info.size)
    np.testing.assert_array_equal(by_array.mask, drawn)


@pytest.mark.parametrize(
    ("fields", "strength"),
    [
        ({}, None),
        ({"image": PHOTO}, 0.8),
        ({"image": PHOTO, "mask": np.ones((16, 16))}, 1.0),
        ({"image": PHOTO, "outpaint": (2, 0, 0, 0)}, 1.0),
        ({"image": PHOTO, "invert": "ddim"}, 1.0),
        ({"image": PHOTO, "upscale": 2}, 0.35),
        ({"image": PHOTO, "latent_upscale": 2}, 0.35),
        ({"image": PHOTO, "upscale": 2, "strength": 0.0}, 0.0),
    ],
)
def test_a_strength_that_is_not_given_is_the_tasks(info, fields, strength):
    assert settled(Request(**fields), info).strength == strength


@pytest.mark.parametrize(
    ("steps", "strength", "start"),
    [(10, 0, 10), (10, 0.3, 7), (10, 0.29, 8), (10, 1, 0), (3, 1 / 3, 2), (7, 6 / 7, 1), (1, 0.8, 0), (3, 0.1, 2)],
)
def test_the_strength_is_the_share_of_steps_that_are_taken(info, steps, strength, start):
    assert met(info, image=PHOTO, steps=steps, strength=strength).start == start


def test_what_is_larger_than_the_model_is_enlarged_in_its_tiles(info):
    assert settled(Request(image=PHOTO, upscale=2), info).tile == 16
    assert settled(Request(image=PHOTO[:8, :8], upscale=2), info).tile is None
    assert settled(Request(image=PHOTO, upscale=2, tile=8), info).tile == 8


def test_a_models_own_settings_stand_in_for_those_that_are_left_out(info):
    own = replace(info, defaults=checked_defaults({"guidance": 3, "sampler": "euler"}, info.scheduler))
    filled = settled(Request(steps=4), own)
    assert (filled.steps, filled.guidance, filled.sampler, filled.schedule) == (4, 3, "euler", "model")
    filled = settled(Request(guidance=0.0, sampler="ddim"), own)
    assert (filled.steps, filled.guidance, filled.sampler) == (30, 0, "ddim")
    spaced = replace(info, defaults=checked_defaults({"schedule": "karras"}, info.scheduler))
    assert settled(Request(), spaced).schedule == "karras"
    assert settled(Request(sampler="pndm"), spaced).schedule == "model", "which is all that pndm can use"


@pytest.mark.parametrize("given", [{"steps": 5000}, {"sampler": "lcm", "steps": 51}, {"guidance": "high"}, {"seed": 1}])
def test_a_model_whose_own_settings_it_cannot_be_sampled_with_is_refused(info, given):
    with pytest.raises(ValueError, match="|".join(given)):
        checked_defaults(given, info.scheduler)


NOISE = np.zeros((8, 8, 4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": (15, 16)}, "size is 15x16.*2"),
        ({"size": (0, 16)}, "size is 0x16.*2"),
        ({"size": (16, 1_000_000)}, "size is 16x1000000.*8192"),
        ({"image": PHOTO[:, :15]}, "15x16.*2"),
        ({"image": PHOTO, "size": (8, 8)}, r"size is \(8, 8\).*16x16"),
        ({"image": np.zeros((16, 1024, 3), np.uint8), "upscale": 16}, "16384x256.*8192"),
        ({"image": PHOTO, "outpaint": (3, 0, 0, 0)}, "19x16.*2"),
        ({"image": PHOTO, "mask": np.ones((8, 16))}, "mask is 16x8.*16x16"),
        ({"latents": NOISE, "size": (16, 8)}, r"latents.*\(8, 8, 4\).*\(4, 8, 4\)"),
        ({"latents": NOISE[..., :3]}, r"latents.*\(8, 8, 3\).*\(8, 8, 4\)"),
        ({"steps": 1001}, "steps is 1001.*1000"),
        ({"tile": 6}, "tile is 6x6.*4"),
        ({"clip_skip": 2}, "clip_skip is 2.* 2 layers.* 1"),
        ({"image": PHOTO, "invert": "ddim", "sampler": "euler"}, "invert.*ddim.*euler"),
        ({"image": PHOTO, "invert": "exact", "eta": 0.5}, "eta is 0.5"),
    ],
)
def test_what_does_not_fit_the_model_is_named_with_its_value_and_the_models(info, fields, words):
    with pytest.raises(ValueError, match=words):
        met(info, **fields)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"steps": 3}, {}, "steps"),
        ({"guidance": 3}, {"guidance": 4}, "guidance"),
        ({"size": (16, 16)}, {"size": (32, 16)}, "size"),
        ({"regions": [("a", np.ones((16, 16)))]}, {"regions": [("a", np.eye(16))]}, "regions"),
        ({"to_seed": 3}, {}, "to_seed"),
        ({"image": PHOTO}, {"image": PHOTO, "mask": np.ones((16, 16))}, "mask"),
        ({"image": PHOTO}, {"image": WIDE}, "size"),
    ],
)
def test_requests_that_are_drawn_together_share_what_is_not_each_images_own(info, first, second, name):
    with pytest.raises(ValueError, match=name):
        met(info, Request(**first), Request(**second))
    met(info, Request("a", seed=3, **first), Request("b", "c", **first))


def test_defaults_of_the_model_are_the_same_request_as_when_they_are_given(info):
    met(info, Request(steps=30), Request(sampler="ddim"))


def test_what_no_memory_can_hold_is_refused_with_both_numbers(info):
    with pytest.raises(ValueError, match=r"999 x 8192x8192.*\d+ GB.*\d+ GB"):
        met(info, *[Request(size=(8192, 8192))] * 999)
    # 2 prompts x 2 heads x 16384 tokens squared were 4 GB of scores once; in blocks they take what a picture takes.
    met(info, *[Request(size=(256, 256))] * 64)


def test_an_inpainting_model_wants_a_mask():
    model = tiny.inpainting_model()
    own = ModelInfo(model.modules(), model.scheduler, model.size, np.float32, checked_defaults({}, model.scheduler))
    with pytest.raises(ValueError, match=r"inpainting.*mask"):
        met(own, prompt="a")
    assert met(own, image=PHOTO, mask=np.ones((16, 16))).start == 0


def test_a_model_that_says_no_size_wants_one(info):
    for fields, shape in (({"size": (16, 16)}, (8, 8, 4)), ({"image": WIDE}, (8, 12, 4))):
        assert met(replace(info, size=None), **fields).shape == shape
    with pytest.raises(ValueError, match="size"):
        met(replace(info, size=None))


def test_a_models_few_training_steps_are_its_most(info):
    short = replace(info, scheduler=SchedulerConfig(num_train_timesteps=50))
    with pytest.raises(ValueError, match=r"steps is 51.*50"):
        met(short, steps=51)
