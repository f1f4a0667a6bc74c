"""What is drawn beside one prompt: images, masks, regions, compositions, tiles, ways between two images."""

import random

import jax
import numpy as np
import pytest
import tiny
from tiny import off

from jaxdiff.generation.canvas import fitted
from jaxdiff.generation.conditioning import PromptWarning, on_sphere
from jaxdiff.generation.edits import interpolate, trajectory
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.programs import denoise
from jaxdiff.sampling.torch_noise import torch_latents

PHOTO = np.random.default_rng(5).integers(0, 256, (16, 16, 3), dtype=np.uint8)
HALF = np.zeros((16, 16), np.float32)  # the right half is drawn anew
HALF[:, 8:] = 1


@pytest.fixture(scope="module")
def through_vae(pipe):
    """The photo as the autoencoder has it."""
    return pipe.decode(pipe.encode(PHOTO[None]))[0]


# From an image --------------------------------------------------------------------------------------------------------


def test_an_image_at_strength_0_is_itself_as_the_autoencoder_has_it(pipe, through_vae):
    assert off(pipe("a dog", image=PHOTO, strength=0)[0], through_vae) <= 1


def test_an_image_steers_the_result_the_less_the_stronger_it_is_drawn_over(pipe, through_vae):
    def distance(strength):
        return np.abs(pipe("a dog", image=PHOTO, strength=strength, steps=10)[0].astype(int) - through_vae).mean()

    assert 0 < distance(0.2) < distance(0.6) < distance(1.0)


def test_what_a_mask_keeps_is_returned_exactly_and_the_rest_is_drawn(pipe):
    for settings in ({}, {"feather": 3}, {"strength": 0.5}):
        out = pipe("a dog", image=PHOTO, mask=HALF, steps=4, **settings)[0]
        np.testing.assert_array_equal(out[:, :8], PHOTO[:, :8])
        assert off(out[:, 12:], PHOTO[:, 12:]) > 8


def test_a_mask_of_everything_is_text_to_image_and_of_nothing_is_the_image(pipe):
    everything = pipe("a dog", image=PHOTO, mask=np.ones((16, 16)), steps=4)
    assert off(everything, pipe("a dog", steps=4)) <= 1
    with pytest.warns(PromptWarning, match="selects nothing"):
        kept = pipe("a dog", image=PHOTO, mask=np.zeros((16, 16), bool), steps=4)
    np.testing.assert_array_equal(kept[0], PHOTO)


def test_images_and_masks_may_be_one_for_each(pipe):
    both = pipe(["a dog"] * 2, image=np.stack([PHOTO, PHOTO[::-1]]), mask=np.stack([HALF, 1 - HALF]), steps=3)
    np.testing.assert_array_equal(both[0][:, :8], PHOTO[:, :8])
    np.testing.assert_array_equal(both[1][:, 8:], PHOTO[::-1][:, 8:])
    assert off(both[0], pipe("a dog", image=PHOTO, mask=HALF, steps=3)[0]) <= 1


def test_an_inpainting_model_sees_the_mask_and_the_rest_of_the_image_alone():
    inpainter = Pipeline(tiny.inpainting_model())
    out = inpainter("a dog", image=PHOTO, mask=HALF, steps=3)[0]
    np.testing.assert_array_equal(out[:, :8], PHOTO[:, :8])
    hidden = PHOTO.copy()
    hidden[:, 8:] = 0
    np.testing.assert_array_equal(inpainter("a dog", image=hidden, mask=HALF, steps=3)[0], out)
    changed = PHOTO.copy()
    changed[:, :8] = 255 - changed[:, :8]
    assert off(inpainter("a dog", image=changed, mask=HALF, steps=3)[0][:, 12:], out[:, 12:]) > 0


@pytest.mark.slow  # EDICT's own exactness is test_inversion's
def test_exact_inversion_then_sampling_gives_the_image_back(pipe, through_vae):
    settings = {"image": PHOTO, "invert": "exact", "source_prompt": "a red apple", "guidance": 1, "steps": 6}
    assert off(pipe("a red apple", **settings)[0], through_vae) <= 1
    assert off(pipe("a dog", **settings)[0], through_vae) > 8


def test_ddim_inversion_comes_nearer_with_more_steps(pipe, through_vae):
    def distance(steps):
        back = pipe("a dog", image=PHOTO, invert="ddim", source_prompt="a dog", guidance=1, steps=steps)
        return np.abs(back[0].astype(int) - through_vae).mean()

    assert distance(200) < distance(20) / 2


def test_a_layout_that_is_kept_is_the_sources(pipe):
    settings = {"image": PHOTO, "invert": "ddim", "source_prompt": "a dog", "guidance": 1, "steps": 6}
    same = pipe("a dog", **settings)
    assert off(pipe("a dog", keep_layout=1.0, **settings), same) <= 1, "with the source's own prompt nothing changes"
    free, kept = (pipe("a red apple", keep_layout=keep, **settings) for keep in (0, 1.0))
    assert off(free, kept) > 0


# Larger ---------------------------------------------------------------------------------------------------------------


def test_outpainting_keeps_the_image_and_draws_round_it(pipe):
    out = pipe("a dog", image=PHOTO, outpaint=(0, 2, 4, 0), steps=3)[0]
    assert out.shape == (18, 20, 3)
    np.testing.assert_array_equal(out[2:, :16], PHOTO)
    assert out[:2].std() > 0


def test_upscaling_that_draws_nothing_anew_is_the_enlarged_image_as_the_autoencoder_has_it(pipe):
    small = PHOTO[:8, :8]
    enlarged = fitted(small, (16, 16))[None]
    assert off(pipe("a dog", image=small, upscale=2, strength=0.0), pipe.decode(pipe.encode(enlarged))) <= 1
    stretched = jax.image.resize(pipe.encode(small[None]), (1, 8, 8, 4), "bilinear")
    assert off(pipe("a dog", image=small, latent_upscale=2, strength=0.0), pipe.decode(stretched)) <= 1


def test_a_tile_as_large_as_the_image_is_none(pipe):
    np.testing.assert_array_equal(pipe("a dog", tile=16, steps=3), pipe("a dog", steps=3))


# What the denoiser is made of -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guess(pipe):
    """One guess of the denoiser for a prompt, at one noisy latent."""
    x = 3 * pipe.noise(0)

    def ask(prompt, sigma=2.0, **fields):
        return np.asarray(pipe.denoiser(prompt, **{"guidance": 1.0} | fields)(x, sigma))

    return ask


def test_guidance_goes_from_the_negative_prompts_guess_through_the_prompts(guess):
    dog, blue = guess("a dog"), guess("blue")
    np.testing.assert_allclose(guess("a dog", negative_prompt="blue", guidance=3.0), blue + 3 * (dog - blue), atol=1e-4)
    interval = {"negative_prompt": "blue", "guidance": 3.0, "guidance_interval": (1.0, 3.0)}
    np.testing.assert_allclose(guess("a dog", **interval), blue + 3 * (dog - blue), atol=1e-4)
    np.testing.assert_allclose(guess("a dog", 4.0, **interval), guess("a dog", 4.0), atol=1e-4)


def test_prompts_that_are_joined_add_up_their_ways_from_the_negative_prompt(guess):
    dog, blue, empty = guess("a dog"), guess("blue"), guess("")
    joined = empty + 3 * (0.7 * (dog - empty) - 0.5 * (blue - empty))
    np.testing.assert_allclose(guess("a dog:0.7 AND blue:-0.5", guidance=3.0), joined, atol=1e-4)


def test_a_region_is_its_own_prompts_and_the_rest_the_prompts(guess):
    left, dog, blue = np.arange(8)[:, None] < 4, guess("a dog"), guess("blue")
    mask = np.repeat(np.arange(16)[None] < 8, 16, axis=0).astype(np.float32)
    for where in ((0, 0, 0.5, 1), mask):
        np.testing.assert_allclose(guess("a dog", regions=[("blue", where)]), np.where(left, blue, dog), atol=1e-4)
    overlapping = guess("a dog", regions=[("blue", (0, 0, 1, 1)), ("", (0, 0, 1, 1))])
    np.testing.assert_allclose(overlapping, (blue + guess("")) / 2, atol=1e-4)


def test_a_prompt_that_is_edited_changes_at_its_step(guess, pipe):
    sigmas = pipe.sigmas(4)
    for i, prompt in enumerate(["a dog", "a dog", "blue", "blue"]):
        edited = guess("[a dog:blue:2]", sigmas[i], steps=4)
        np.testing.assert_allclose(edited, guess(prompt, sigmas[i]), atol=1e-4)


def test_perturbed_attention_guides_in_proportion_to_its_scale(guess):
    dog = guess("a dog")
    np.testing.assert_allclose(guess("a dog", pag_scale=0.0), dog, atol=1e-4)
    once, twice = (guess("a dog", pag_scale=scale) - dog for scale in (1.5, 3.0))
    assert np.abs(once).max() > 1e-2
    np.testing.assert_allclose(twice, 2 * once, atol=1e-3)


def test_weights_of_one_are_no_weights_and_brackets_that_are_escaped_are_literal(pipe):
    np.testing.assert_array_equal(pipe("(a dog:1.0)", steps=3), pipe("a dog", steps=3))
    np.testing.assert_array_equal(pipe(r"\(a dog\)", steps=3), pipe("(a dog)", literal=True, steps=3))


def test_pytorchs_noise_is_that_of_its_seed(pipe):
    start = torch_latents(7, (8, 8, 4), 1)
    np.testing.assert_array_equal(pipe.noise(7, rng="torch"), start)
    assert off(pipe("a dog", seed=7, rng="torch", steps=3), pipe("a dog", latents=start, steps=3)) <= 1


# From one image to another --------------------------------------------------------------------------------------------


def test_an_interpolation_begins_and_ends_with_its_images_and_passes_those_between(pipe):
    prompts, seeds = ["a dog", "blue", "a red apple"], [1, 2, 3]
    frames = interpolate(pipe, prompts, seeds, frames=2, batch=2, steps=3)
    assert len(frames) == 5
    alone = [pipe(prompt, seed=seed, steps=3)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    for frame, image in zip(frames[::2], alone, strict=True):
        assert off(frame, image) <= 1
    assert min(off(frames[1], alone[0]), off(frames[1], alone[1])) > 0
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        interpolate(pipe, prompts[:2], [1])


def test_noise_on_the_way_along_the_sphere_is_unit_normal_as_its_ends():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 16, 16, 4)).astype(np.float32)
    for mix, end in ((0, a), (1, b)):
        np.testing.assert_allclose(on_sphere(a, b, np.full(3, mix, np.float32)), end, atol=1e-6)
    np.testing.assert_allclose(on_sphere(a, a, np.full(3, 0.3, np.float32)), a, atol=1e-6)
    assert on_sphere(a, b, np.full(3, 0.5, np.float32)).std() == pytest.approx(1, abs=0.05)


def test_a_trajectory_has_a_frame_for_each_step_and_ends_with_the_image(pipe):
    for fields in ({}, {"image": PHOTO, "mask": HALF}):
        frames = trajectory(pipe, "a dog", steps=4, **fields)
        assert len(frames) == 4
        np.testing.assert_array_equal(frames[-1], pipe("a dog", steps=4, **fields)[0])


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_random_settings_compile_once(pipe, masked):
    chance = random.Random(0)
    before = denoise.count
    for i in range(30):
        low = chance.uniform(0, 5)
        settings = {
            "negative_prompt": chance.choice(["", "blue", "a red apple", None]),
            "seed": chance.randrange(2**32),
            "steps": chance.randint(1, 6),
            "guidance": chance.uniform(-2, 20),
            "eta": chance.random(),
            "guidance_rescale": chance.random(),
            "apg_eta": chance.random(),
            "apg_norm_threshold": chance.choice([None, 3.0, 20]),
            "guidance_interval": (low, low + chance.uniform(0, 20)),
            "schedule": chance.choice(["model", "trailing", "karras", "beta"]),
            "literal": chance.random() < 0.5,
            "strength": chance.random(),
        }
        if masked:
            settings |= {"mask": np.roll(HALF, i, axis=1), "feather": chance.uniform(0, 4)}
        prompt = chance.choice(["a dog", "blue", "(a red) apple"])
        assert pipe(prompt, image=np.roll(PHOTO, i, axis=0), **settings).shape == (1, 16, 16, 3)
    assert denoise.count <= before + 1
