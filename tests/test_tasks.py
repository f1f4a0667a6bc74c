"""What a pipeline draws beside prompts: from images, by regions, through windows, between two pictures."""

import inspect
import random
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONFIGS, model, off, pipe  # noqa: F401  (fixtures)

from jaxdiff import build
from jaxdiff.generate import encode_images, text_to_image
from jaxdiff.pipeline import Pipeline
from jaxdiff.sampling.torch_noise import torch_latents
from jaxdiff.scenes import on_sphere
from jaxdiff.tasks import fitted, interpolate, outpaint, trajectory, upscale

# The fixtures are arguments of the tests.
# ruff: noqa: F811


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(5).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def half():
    """The right half is drawn anew."""
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    return mask


@pytest.fixture(scope="module")
def through_vae(model, photo):
    """The photo encoded and decoded by the module itself."""
    vae = build.vae(model.vae)
    variables = {"params": jax.tree.map(jnp.asarray, model.params["vae"])}
    out = vae.apply(variables, jnp.asarray(photo[None] / 127.5 - 1, jnp.float32))
    return np.round((np.clip(out[0], -1, 1) + 1) * 127.5).astype(np.uint8)


def test_an_image_at_strength_0_is_itself_as_the_autoencoder_has_it(pipe, photo, through_vae):
    assert off(pipe("a dog", image=photo, strength=0)[0], through_vae) <= 1


def test_an_image_steers_the_picture_the_less_the_stronger_it_is_drawn_over(pipe, photo, through_vae):
    def distance(strength):
        return np.abs(pipe("a dog", image=photo, strength=strength, steps=10)[0].astype(int) - through_vae).mean()

    assert 0 < distance(0.2) < distance(0.6) < distance(1.0)


def test_what_a_mask_keeps_is_returned_exactly_and_the_rest_is_drawn(pipe, photo, half):
    for settings in ({}, {"feather": 3}, {"strength": 0.5}, {"sampler": "euler_ancestral"}):
        out = pipe("a dog", image=photo, mask=half, steps=4, **settings)[0]
        np.testing.assert_array_equal(out[:, :8], photo[:, :8])
        assert off(out[:, 12:], photo[:, 12:]) > 8


def test_a_mask_of_everything_is_text_to_image_and_of_nothing_is_the_image(pipe, photo):
    everything = pipe("a dog", image=photo, mask=np.ones((16, 16)), steps=4)
    assert off(everything, pipe("a dog", steps=4)) <= 1
    np.testing.assert_array_equal(pipe("a dog", image=photo, mask=np.zeros((16, 16), bool), steps=4)[0], photo)


def test_images_and_masks_may_be_one_for_each(pipe, photo, half):
    both = pipe(["a dog"] * 2, image=np.stack([photo, photo[::-1]]), mask=np.stack([half, 1 - half]), steps=3)
    np.testing.assert_array_equal(both[0][:, :8], photo[:, :8])
    np.testing.assert_array_equal(both[1][:, 8:], photo[::-1][:, 8:])


@pytest.fixture(scope="module")
def inpainter(model):
    """The model with nine channels in: latent, mask, what the mask leaves."""
    kernel = model.params["unet"]["conv_in"]["kernel"]
    more = np.random.default_rng(2).standard_normal((3, 3, 5, 8)).astype(np.float32) / 5
    unet = {**model.params["unet"], "conv_in": {**model.params["unet"]["conv_in"]}}
    unet["conv_in"]["kernel"] = np.concatenate([kernel, more], axis=2)
    config = replace(model.unet, in_channels=9)
    return Pipeline(replace(model, unet=config, params={**model.params, "unet": unet}))


def test_an_inpainting_model_sees_the_mask_and_the_rest_of_the_image_alone(inpainter, photo, half):
    out = inpainter("a dog", image=photo, mask=half, steps=3)[0]
    np.testing.assert_array_equal(out[:, :8], photo[:, :8])
    hidden = photo.copy()
    hidden[:, 8:] = 0
    np.testing.assert_array_equal(inpainter("a dog", image=hidden, mask=half, steps=3)[0], out)
    changed = photo.copy()
    changed[:, :8] = 255 - changed[:, :8]
    assert off(inpainter("a dog", image=changed, mask=half, steps=3)[0][:, 12:], out[:, 12:]) > 0
    with pytest.raises(ValueError, match="This model is for inpainting; give an image and a mask"):
        inpainter("a dog")


def test_exact_inversion_then_sampling_gives_the_image_back(pipe, photo, through_vae):
    back = pipe("a red apple", image=photo, invert="exact", source_prompt="a red apple", guidance=1, steps=6)
    assert off(back[0], through_vae) <= 1
    other = pipe("a dog", image=photo, invert="exact", source_prompt="a red apple", guidance=1, steps=6)
    assert off(other[0], through_vae) > 8


def test_ddim_inversion_comes_nearer_with_more_steps(pipe, photo, through_vae):
    def distance(steps):
        back = pipe("a dog", image=photo, invert="ddim", source_prompt="a dog", guidance=1, steps=steps)
        return np.abs(back[0].astype(int) - through_vae).mean()

    assert distance(200) < distance(20) / 2


def test_a_layout_that_is_kept_is_the_sources(pipe, photo):
    settings = {"image": photo, "invert": "ddim", "source_prompt": "a dog", "guidance": 1, "steps": 6}
    same = pipe("a dog", **settings)
    assert off(pipe("a dog", **settings, keep=1.0), same) <= 1, "with the source's own prompt nothing changes"
    free, kept = (pipe("a red apple", **settings, keep=keep) for keep in (0, 1.0))
    assert off(free, kept) > 0


def test_a_region_that_is_all_of_the_picture_is_drawn_as_its_own_prompt(pipe):
    whole = pipe("a dog", regions=[("a red apple", (0, 0, 1, 1))], steps=3)
    assert off(whole, pipe("a red apple", steps=3)) <= 1
    left = np.zeros((16, 16))
    left[:, :8] = 1
    box, mask = (pipe("a dog", regions=[("a red apple", where)], steps=3) for where in ((0, 0, 0.5, 1), left))
    np.testing.assert_array_equal(box, mask)
    assert off(box, whole) > 0


def test_a_composition_of_one_prompt_twice_with_half_the_weight_is_that_prompt(pipe):
    both = pipe("a dog:0.5 AND a dog:0.5", steps=3)
    assert off(both, pipe("a dog", steps=3)) <= 1


def test_a_schedule_changes_the_prompt_at_its_step(pipe):
    plain = {prompt: pipe(prompt, steps=4) for prompt in ("a dog", "blue")}
    assert off(pipe("[a dog:a dog:0.5]", steps=4), plain["a dog"]) <= 1
    switched = pipe("[a dog:blue:2]", steps=4)
    assert off(switched, plain["a dog"]) > 0
    assert off(switched, plain["blue"]) > 0
    told = []
    pipe("[a dog:blue:2]", steps=4, watch=lambda step, images: told.append(images))
    alone = []
    pipe("a dog", steps=4, watch=lambda step, images: alone.append(images))
    assert off(told[0], alone[0]) <= 1, "the first two steps are the first prompt's"


def test_weights_of_one_are_no_weights_and_brackets_may_be_literal(pipe):
    np.testing.assert_array_equal(pipe("(a dog:1.0)", steps=3), pipe("a dog", steps=3))
    assert off(pipe("(a dog:1.5)", steps=3), pipe("a dog", steps=3)) > 0
    assert off(pipe("(a dog)", steps=3, literal=True), pipe("(a dog)", steps=3)) > 0


def test_a_window_as_large_as_the_picture_is_none_and_smaller_ones_cover_larger_pictures(pipe):
    np.testing.assert_array_equal(pipe("a dog", window=16, steps=3), pipe("a dog", steps=3))
    wide = pipe("a dog", window=16, size=(40, 16), steps=3)
    assert wide.shape == (1, 16, 40, 3)
    assert off(wide, pipe("a dog", size=(40, 16), steps=3)) > 0


def test_between_two_pictures_the_ends_are_the_pictures(pipe):
    first, second = pipe("a dog", seed=3, steps=3), pipe("blue", seed=8, steps=3)
    way = pipe(["a dog"] * 3, seed=[3] * 3, to_prompts="blue", to_seed=[8] * 3, share=[0, 0.5, 1], steps=3)
    assert off(way[0], first[0]) <= 1
    assert off(way[2], second[0]) <= 1
    assert min(off(way[1], first[0]), off(way[1], second[0])) > 0


def test_noise_half_way_on_the_sphere_is_as_loud_as_its_ends():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 16, 16, 4)).astype(np.float32)
    np.testing.assert_allclose(on_sphere(a, b, np.zeros(3, np.float32)), a, atol=1e-6)
    np.testing.assert_allclose(on_sphere(a, b, np.ones(3, np.float32)), b, atol=1e-6)
    np.testing.assert_allclose(on_sphere(a, a, np.full(3, 0.3, np.float32)), a, atol=1e-6)
    assert on_sphere(a, b, np.full(3, 0.5, np.float32)).std() == pytest.approx(1, abs=0.05)


def test_each_picture_may_have_its_own_seed(pipe):
    both = pipe(["a dog"] * 2, seed=[5, 1000], steps=3)
    for image, seed in zip(both, (5, 1000), strict=True):
        assert off(image, pipe("a dog", seed=seed, steps=3)[0]) <= 1


def test_pytorchs_noise_is_that_of_its_seed(pipe):
    start = torch_latents(7, (8, 8, 4), 1)
    given = pipe("a dog", latents=start, steps=3)
    np.testing.assert_array_equal(pipe("a dog", seed=7, noise="torch", steps=3), given)
    assert off(pipe("a dog", seed=7, noise="torch", steps=3, eta=1.0), given) > 0


def test_perturbed_attention_of_no_weight_changes_nothing(pipe):
    plain = pipe("a dog", steps=3)
    assert off(pipe("a dog", steps=3, perturbed=0.0), plain) <= 1
    assert off(pipe("a dog", steps=3, perturbed=3.0), plain) > 0


def test_guidance_that_is_rescaled_or_projected_draws_another_picture(pipe):
    plain = pipe("a dog", steps=3)
    for turned in ({"rescale": 0.7}, {"parallel": 0.0}, {"limit": 0.1}):
        assert off(pipe("a dog", steps=3, **turned), plain) > 0
    np.testing.assert_array_equal(pipe("a dog", steps=3, rescale=0.0, parallel=1.0, limit=1e30), plain)


def test_watching_changes_no_pixel_and_ends_with_the_picture(pipe):
    seen = {}
    watched = pipe("a dog", steps=5, eta=0.5, watch=lambda step, images: seen.update({step: images}))
    np.testing.assert_array_equal(watched, pipe("a dog", steps=5, eta=0.5))
    assert list(seen) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(seen[5], watched)


@pytest.mark.slow
def test_pictures_spread_over_eight_devices_are_those_of_one(pipe, model, photo, half):
    spread = Pipeline(model, devices=jax.devices())
    for settings in ({}, {"image": photo, "mask": half}):
        images = spread(["a dog", "blue"] * 4, seed=3, steps=3, eta=1.0, **settings)
        together = pipe(["a dog", "blue"] * 4, seed=3, steps=3, eta=1.0, **settings)
        assert off(images, together) <= 1
    assert off(spread("a dog", steps=3), pipe("a dog", steps=3)) <= 1, "one picture alone is drawn by each"


@pytest.mark.parametrize("task", ["text", "image", "mask"])
def test_a_hundred_random_settings_compile_once(pipe, photo, half, task):
    chance = random.Random(0)
    before = text_to_image.count
    for i in range(100):
        low = chance.uniform(0, 5)
        settings = {
            "negative_prompt": chance.choice(["", "blue", "a red apple", None]),
            "seed": chance.randrange(2**32),
            "steps": chance.randint(1, 6),
            "guidance": chance.uniform(-2, 20),
            "eta": chance.random(),
            "rescale": chance.random(),
            "parallel": chance.random(),
            "limit": chance.choice([None, 3.0, 20]),
            "guidance_interval": (low, low + chance.uniform(0, 20)),
            "grid": chance.choice(["model", "trailing", "karras", "beta"]),
            "literal": chance.random() < 0.5,
        }
        if task != "text":
            settings |= {"image": np.roll(photo, i, axis=0), "strength": chance.random()}
        if task == "mask":
            settings |= {"mask": np.roll(half, i, axis=1), "feather": chance.uniform(0, 4)}
        pipe(chance.choice(["a dog", "blue", "(a red) apple"]), **settings)
    assert text_to_image.count <= before + 1


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"strength": 0.5}, "mask, strength and invert are for an image; give one"),
    ({"mask": np.ones((16, 16))}, "mask, strength and invert are for an image"),
    ({"image": np.zeros((16, 16, 3))}, "image must be uint8 [height, width, 3]"),
    ({"image": np.zeros((16, 16), np.uint8)}, "image must be uint8"),
    ({"image": np.zeros((3, 16, 16, 3), np.uint8)}, "image holds 3 pictures for 1 prompts"),
    ({"image": np.zeros((15, 16, 3), np.uint8)}, "The image is 16x15; both sides must be multiples of 2"),
    ({"image": "photo", "size": (8, 8)}, "size is 8x8, but the image is 16x16"),
    ({"image": "photo", "size": (16, 16), "enlarge": 2}, "size is 16x16, but the image is 32x32 enlarged"),
    ({"enlarge": 2}, "enlarge is for an image that is drawn on as a whole"),
    ({"image": "photo", "mask": np.ones((16, 16)), "enlarge": 2}, "as a whole; give one, without mask and invert"),
    ({"image": "photo", "enlarge": 1000}, "size is 16000x16000; a side may have 8192 pixels"),
    ({"image": "photo", "strength": 1.5}, "strength is 1.5; it must lie from 0 to 1"),
    ({"image": "photo", "strength": "much"}, "strength is 'much'"),
    ({"image": "photo", "mask": np.ones((8, 16))}, "mask is 16x8, and the picture 16x16"),
    ({"image": "photo", "mask": np.full((16, 16), 2.0)}, "mask must be numbers from 0 (kept) to 1 (drawn)"),
    ({"image": "photo", "mask": np.full((16, 16), np.nan)}, "mask must be numbers"),
    ({"image": "photo", "mask": np.ones((16, 16)), "feather": -1}, "feather is -1; it must be 0 or more"),
    ({"image": "photo", "invert": "magic"}, "invert is 'magic'; it must be 'ddim' or 'exact'"),
    ({"image": "photo", "invert": "ddim", "sampler": "euler"}, "the sampler ddim; leave out sampler 'euler'"),
    ({"image": "photo", "invert": "ddim", "eta": 0.5}, "eta is 0.5, which adds noise that invert has not found"),
    ({"image": "photo", "invert": "ddim", "source_prompt": "[a:b:0.5]"}, "A source prompt may have no schedule"),
    ({"keep": 0.5}, "keep and source_prompt are for an image whose noise is found"),
    ({"image": "photo", "invert": "ddim", "mask": np.ones((16, 16))}, "leave out mask and latents"),
    ({"regions": [("a", (0, 0, 2, 1))]}, "A region's box is (0, 0, 2, 1)"),
    ({"regions": [("a", np.ones((5, 5)))]}, "A region is a box of four shares, or numbers"),
    ({"regions": 5}, "A region is 5; it must be a prompt and where"),
    ({"regions": [(5, (0, 0, 1, 1))]}, "A region is (5, (0, 0, 1, 1))"),
    ({"window": 7}, "window is 7x7; both sides must be multiples of 4, what the network halves to whole numbers"),
    ({"window": 8, "cache_interval": 2}, "cache_interval keeps the features of one window alone"),
    ({"share": 1.5}, "share is 1.5; it must lie from 0 to 1"),
    ({"to_prompts": "a AND b", "share": 0.5}, "A second prompt is for prompts without AND"),
    ({"to_prompts": ["a", "b"]}, "There are 2 second prompts for 1 prompts"),
    ({"noise": "numpy"}, "noise is 'numpy'; it must be 'jax' or 'torch'"),
    ({"noise": "torch", "sampler": "dpmpp_sde"}, "noise 'torch' is not for dpmpp_sde"),
    ({"rescale": 2}, "rescale is 2; it must lie from 0 to 1"),
    ({"perturbed": float("nan")}, "perturbed is nan; it must be a finite number"),
    ({"stepz": 3}, "There is no setting 'stepz'; did you mean 'steps'?"),
    ({"seed": [1, 2]}, "There are 2 seeds for 1 images"),
    ({"seed": [-1]}, "seed is -1; it must lie from 0 to 4294967295"),
    ({"literal": 1}, "literal is 1; it must be true or false"),
    ({"wildcards": "no/such/folder"}, "no/such/folder is no folder of wildcards"),
])  # fmt: skip
def test_bad_arguments_are_refused_in_a_sentence(pipe, photo, settings, sentence):
    given = settings | ({"image": photo} if isinstance(settings.get("image"), str) else {})
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inspect.unwrap(Pipeline.__call__)(pipe, "a dog", **given)


def test_an_interpolation_begins_and_ends_with_its_pictures_and_passes_those_between(pipe):
    prompts, seeds = ["a dog", "blue", "a red apple"], [1, 2, 3]
    frames = interpolate(pipe, prompts, seeds, frames=2, batch=2, steps=3)
    assert len(frames) == 5
    for frame, prompt, seed in zip(frames[::2], prompts, seeds, strict=True):
        assert off(frame, pipe(prompt, seed=seed, steps=3)[0]) <= 1
    with pytest.raises(ValueError, match="There are 2 prompts and 1 seeds; give two or more, a seed for each"):
        interpolate(pipe, prompts[:2], [1])


def test_a_trajectory_has_a_frame_for_each_step_and_ends_with_the_picture(pipe):
    frames = trajectory(pipe, "a dog", steps=4)
    assert len(frames) == 4
    np.testing.assert_array_equal(frames[-1], pipe("a dog", steps=4)[0])


def test_outpainting_keeps_the_image_and_draws_round_it(pipe, photo):
    out = outpaint(pipe, "a dog", photo, right=4, top=2, steps=3)
    assert out.shape == (18, 20, 3)
    np.testing.assert_array_equal(out[2:, :16], photo)


def test_upscaling_draws_the_image_larger_through_windows_of_the_models_size(pipe, photo):
    out = upscale(pipe, "a dog", photo, steps=4)
    assert out.shape == (32, 32, 3)
    soft = np.asarray(fitted(pipe, photo, (32, 32)))
    np.testing.assert_array_equal(out, pipe("a dog", image=soft, strength=0.35, window=16, steps=4)[0])
    with pytest.raises(ValueError, match="The factor is 0"):
        upscale(pipe, "a dog", photo, factor=0)


def test_upscaling_of_the_latent_stretches_what_the_image_is_encoded_to(pipe, photo):
    out = upscale(pipe, "a dog", photo, strength=0.0, latent=True, window=None, steps=4)
    program, vae = pipe.program("ddim"), pipe.params["vae"]
    latent = jax.image.resize(encode_images(vae, photo[None], program=program), (1, 16, 16, 4), "bilinear")
    drawn = program.vae.apply({"params": vae}, latent / program.scaling_factor, method="decode")
    np.testing.assert_allclose(out, 127.5 * (np.clip(drawn[0], -1, 1) + 1), atol=0.51)
    again = upscale(pipe, "a dog", photo, strength=0.5, latent=True, steps=4)
    np.testing.assert_array_equal(again, pipe("a dog", image=photo, enlarge=2, strength=0.5, window=16, steps=4)[0])


@pytest.mark.parametrize(("size", "fitting"), [((16, 16), (16, 16)), ((100, 50), (32, 16)), ((30, 400), (16, 212)),
                                               ((8, 8), (16, 16))])  # fmt: skip
def test_an_image_is_fitted_to_the_models_own_size(pipe, size, fitting):
    image = fitted(pipe, np.zeros((*size[::-1], 3), np.uint8))
    assert image.shape == (*fitting[::-1], 3)
    assert fitted(pipe, np.zeros((*size[::-1], 3), np.uint8), (20, 12)).shape == (12, 20, 3)
