"""The pipeline on a whole random model that is tiny: what an image depends on, what compiles, loading and saving."""

import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import off

import jaxdiff
from jaxdiff.generation.edits import trajectory
from jaxdiff.generation.pipeline import OF_THE_LOOP, Pipeline
from jaxdiff.generation.programs import denoise
from jaxdiff.generation.request import Request
from jaxdiff.model import Network, read_model
from jaxdiff.sampling.samplers import SAMPLERS, Sampler
from jaxdiff.sampling.sigmas import K_DIFFUSION

PHOTO = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)

# What an image depends on ---------------------------------------------------------------------------------------------


def test_image_i_of_a_batch_is_the_image_of_its_own_prompt_and_seed(pipe):
    settings = {"steps": 4, "eta": 1.0, "guidance": 4.0}
    prompts, negative = ["a dog", "a red apple", "blue"], ["", "blue", ""]
    together = pipe(prompts, negative, seed=7, **settings)
    assert (together.shape, together.dtype) == ((3, 16, 16, 3), np.uint8)
    for i in range(3):
        alone = pipe(prompts[i], negative[i], seed=7 + i, **settings)[0]
        assert off(together[i], alone) <= 1, "batched convolutions round differently, and no more"
    assert off(together[0], together[1]) > 8
    apart = pipe(prompts, negative, seed=[1000, 8, 5], **settings)
    assert off(apart[1], together[1]) <= 1
    assert off(apart[0], together[0]) > 8


def test_requests_that_are_drawn_together_are_the_calls_one_by_one(pipe):
    requests = [Request("a dog", seed=3, n=2, steps=3), Request("blue", "a dog", steps=3)]
    together = pipe.draw(requests)
    calls = [("a dog", "", 3), ("a dog", "", 4), ("blue", "a dog", 2)]
    for image, call in zip(together, calls, strict=True):
        assert off(image, pipe(*call, steps=3)[0]) <= 1
    with pytest.raises(ValueError, match="guidance"):
        pipe.draw([requests[0], replace(requests[1], guidance=1.0)])


def test_n_images_of_one_prompt_have_seeds_one_after_another(pipe):
    both = pipe("a dog", seed=3, n=3, steps=3)
    for image, seed in zip(both, (3, 4, 5), strict=True):
        assert off(image, pipe("a dog", seed=seed, steps=3)[0]) <= 1


def test_latents_stand_in_for_the_noise_of_the_seed_that_drew_them(pipe):
    given = pipe("a dog", latents=pipe.noise(3)[0], seed=9, steps=3)
    np.testing.assert_array_equal(given, pipe("a dog", seed=3, steps=3))
    noise = pipe.noise([1, 2], rng="torch")
    assert off(pipe("a dog", latents=noise[1], steps=3), pipe("a dog", seed=2, rng="torch", steps=3)) <= 1


def test_guidance_of_one_and_less_is_the_prompt_alone(pipe):
    dog = pipe("a dog", guidance=1.0, steps=3)
    np.testing.assert_array_equal(dog, pipe("a dog", "a red apple", guidance=1.0, steps=3))
    for less in (0.0, 0.5, -3.0):
        np.testing.assert_array_equal(dog, pipe("a dog", "a red apple", guidance=less, steps=3))


@pytest.mark.parametrize("settings", [{}, pytest.param({"cache_interval": 2}, marks=pytest.mark.slow)])
def test_guidance_at_all_levels_is_plain_guidance_and_at_none_it_is_a_scale_of_one(pipe, settings):
    settings = {"steps": 5, "eta": 0.5, "negative_prompt": "a red apple"} | settings
    plain, one = (pipe("a dog", guidance=guidance, **settings) for guidance in (7.5, 1.0))
    assert off(pipe("a dog", guidance_interval=(0, 1e30), **settings), plain) <= 1
    assert off(pipe("a dog", guidance_interval=(0, 0), **settings), one) <= 1


def test_guidance_that_is_neither_rescaled_nor_projected_nor_limited_is_plain_guidance(pipe):
    neutral = {"guidance_rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": 1e30}
    np.testing.assert_array_equal(pipe("a dog", steps=3, **neutral), pipe("a dog", steps=3))


def test_features_kept_over_steps_draw_nearly_the_same_image_in_any_pieces(pipe):
    settings = {"steps": 24, "eta": 0.5, "guidance": 2.0}
    exact, other = pipe("a dog", **settings), pipe("a dog", seed=1, **settings)
    kept = pipe("a dog", cache_interval=2, **settings)
    assert 0 < np.abs(kept.astype(int) - exact).mean() < np.abs(other.astype(int) - exact).mean()
    told = []
    np.testing.assert_array_equal(pipe("a dog", cache_interval=2, **settings, progress=told.append), kept)
    assert told == [*range(4, 21, 4), 24], "pieces end where features are computed anew"


def test_progress_is_told_to_the_end_and_changes_no_pixel(pipe):
    told = []
    watched = pipe("a dog", steps=23, eta=0.5, progress=told.append)
    assert told == [*range(3, 22, 3), 23]
    np.testing.assert_array_equal(watched, pipe("a dog", steps=23, eta=0.5))


def test_looking_at_each_step_changes_no_pixel_and_the_last_guess_is_the_image(pipe):
    seen = {}
    watched = pipe("a dog", sampler="euler", steps=5, on_step=lambda step, guess: seen.update({step: guess}))
    np.testing.assert_array_equal(watched, pipe("a dog", sampler="euler", steps=5))
    assert list(seen) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(pipe.decode(seen[5]), watched)
    assert pipe.preview(seen[5]).shape == (1, 8, 8, 3)


def test_steps_are_counted_as_they_were_asked_for(pipe):
    told = []
    pipe("a dog", sampler="pndm", steps=5, on_step=lambda step, guess: told.append(step), progress=told.append)
    assert told == sorted(told)
    assert set(told) == {1, 2, 3, 4, 5}, "pndm takes its first step twice"
    pipe("a dog", image=PHOTO, strength=0.0, steps=5, on_step=lambda step, guess: pytest.fail("there is no step"))


def test_what_overflows_is_told_and_not_drawn_black(pipe):
    with pytest.raises(ValueError, match=r"float32.*guidance 1e\+30"):
        pipe("a dog", guidance=1e30, steps=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompts": []}, "prompt"),
        ({"negative_prompt": ["", ""]}, "2 of negative_prompt for 1"),
        ({"seed": [1, 2]}, "2 of seed for 1"),
        ({"to_prompt": ["a", "b"]}, "2 of to_prompt for 1"),
        ({"image": np.zeros((3, 16, 16, 3), np.uint8)}, "3 of image for 1"),
        ({"stepz": 3}, "'stepz'.*'steps'"),
        ({"wildcards": "no/such/folder"}, "no/such/folder"),
        ({"image": 5}, "image"),
        ({"image": [PHOTO, PHOTO[:8]]}, "2 of image for 1"),
        ({"mask": True}, "mask"),
        ({"prompts": 5}, "prompts is 5"),
        ({"prompts": ["a", "b"], "n": [1, "2"]}, "n is '2'"),
    ],
)
def test_what_a_call_cannot_spread_over_its_images_is_named_with_both_numbers(pipe, call, words):
    with pytest.raises(ValueError, match=words):
        pipe.requests(**{"prompts": "a dog"} | call)


# Loops of one's own ---------------------------------------------------------------------------------------------------


def test_a_loop_of_one_s_own_over_the_denoiser_draws_what_a_call_draws(pipe):
    denoise_fn, sigmas = pipe.denoiser("a dog", "blue", guidance=4.0), pipe.sigmas(6, sampler="euler")
    assert len(sigmas) == 7
    x = pipe.noise(5) * np.sqrt(1 + sigmas[0] ** 2)
    for sigma, below in pairwise(sigmas):
        x_0 = denoise_fn(x, sigma)
        x = x_0 + below / sigma * (x - x_0)
    drawn = pipe("a dog", "blue", 5, sampler="euler", steps=6, guidance=4.0)
    assert off(pipe.decode(x), drawn) <= 1


def my_euler(denoise_fn, noise_fn):
    def step_fn(x, history, step):
        x_0 = denoise_fn(x, step.sigma)
        return x_0 + step.sigma_next / step.sigma * (x - x_0), history

    return step_fn


def test_a_sampler_of_one_s_own_is_used_by_its_name(pipe, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(my_euler, K_DIFFUSION))
    assert off(pipe("a dog", sampler="mine", steps=5), pipe("a dog", sampler="euler", steps=5)) <= 1


def test_the_denoiser_can_be_called_in_jit_and_grad(pipe):
    denoise_fn, x, along = pipe.denoiser("a dog", "blue", guidance=4.0), pipe.noise(0), pipe.noise(1)

    def loss(x):
        return denoise_fn(x, 1.0).sum()

    value, slope = jax.jit(jax.value_and_grad(loss))(x)
    assert float(value) == pytest.approx(float(loss(x)), rel=1e-4)
    rise = (loss(x + 1e-2 * along) - loss(x - 1e-2 * along)) / 2e-2
    assert float((slope * along).sum()) == pytest.approx(float(rise), rel=0.02)


def test_a_denoiser_that_is_an_argument_leaves_its_params_out_of_the_program(pipe):
    denoise_fn, x = pipe.denoiser("a dog"), pipe.noise(0)

    def twice(denoise_fn, x):
        return denoise_fn(denoise_fn(x, 2.0), 1.0)

    program = jax.jit(twice).lower(denoise_fn, x)
    assert len(program.as_text()) < 0.5 * len(jax.jit(partial(twice, denoise_fn)).lower(x).as_text())
    np.testing.assert_allclose(program.compile()(denoise_fn, x), twice(denoise_fn, x), atol=1e-3)


@pytest.mark.parametrize("name", sorted(OF_THE_LOOP))
def test_a_denoiser_refuses_what_only_a_loop_has_a_use_for(pipe, name):
    with pytest.raises(ValueError, match=name):
        pipe.denoiser("a dog", **{name: 2})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pipe: pipe.denoiser("a dog")(np.zeros((1, 8, 8, 3)), 1.0), r"\[1, 8, 8, 3\].*\[1, 8, 8, 4\]"),
        (lambda pipe: pipe.denoiser("a dog")(np.zeros((2, 8, 8, 4)), 1.0), r"\[2, 8, 8, 4\].*\[1, 8, 8, 4\]"),
        (lambda pipe: pipe.denoiser("a dog")(pipe.noise(0), [1.0, 2.0]), r"sigma \[2\]"),
        (lambda pipe: pipe.denoiser("a dog")(pipe.noise(0), 0.0), "sigma is 0"),
        (lambda pipe: pipe.denoiser("a dog")(pipe.noise(0), np.nan), "sigma is nan"),
        (lambda pipe: pipe.denoiser("a dog")(pipe.noise(0), 1j), "sigma is 1j"),
        (lambda pipe: pipe.denoiser("a dog", image=PHOTO), "image.*mask"),
        (lambda pipe: pipe.encode(np.zeros((1, 16, 16, 3))), "images is float64"),
        (lambda pipe: pipe.encode(PHOTO), r"uint8 \[16, 16, 3\]"),
        (lambda pipe: pipe.encode(PHOTO[None, :15]), "16x15.*2"),
        (lambda pipe: pipe.decode(np.zeros((1, 8, 8, 3))), r"\[1, 8, 8, 3\].*4"),
        (lambda pipe: pipe.decode(np.zeros((8, 8, 4))), r"\[8, 8, 4\].*4"),
        (lambda pipe: pipe.noise(-1), "seed is -1"),
        (lambda pipe: pipe.noise([]), "seed is an empty list"),
        (lambda pipe: pipe.decode(np.full((1, 8, 8, 4), np.nan)), "not finite"),
        (lambda pipe: pipe.preview(np.zeros((1, 8, 8, 3))), r"\[1, 8, 8, 3\].*4"),
        (lambda pipe: pipe.denoiser("a dog", seed=3), "seed .*mask"),
        (lambda pipe: pipe.sigmas(0), "steps is 0"),
        (lambda pipe: pipe.draw("a dog"), "requests is 'a dog'"),
        (lambda pipe: pipe.draw([]), "requests is"),
        (lambda pipe: trajectory(pipe, ["a", "b"], steps=1), "2 images"),
    ],
)
def test_what_a_loop_of_one_s_own_cannot_give_is_named_with_its_rule(pipe, call, words):
    with pytest.raises(ValueError, match=words):
        call(pipe)


def test_encoding_and_decoding_are_the_autoencoders_at_unit_variance(pipe, model):
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    latents, networks, vae = pipe.encode(image), model.modules(), jax.tree.map(jnp.asarray, model.params["vae"])
    apply = jax.jit(networks.vae.apply, static_argnames="method")
    moments = apply({"params": vae}, jnp.asarray(image / 127.5 - 1, jnp.float32), method="encode")
    np.testing.assert_allclose(latents, tiny.VAE.scaling_factor * moments[..., :4], atol=1e-4)
    decoded = apply({"params": vae}, latents / tiny.VAE.scaling_factor, method="decode")
    np.testing.assert_allclose(pipe.decode(latents), (np.clip(decoded, -1, 1) + 1) * 127.5, atol=0.51)


# What compiles --------------------------------------------------------------------------------------------------------


def test_nothing_a_user_turns_compiles_again(pipe):
    pipe("a dog", steps=3)
    before = denoise.count
    for settings in (
        {"seed": 5}, {"steps": 1}, {"steps": 7}, {"steps": 50}, {"guidance": 1.0}, {"guidance": 30.0}, {"eta": 1.0},
        {"negative_prompt": "a blue background"}, {"latents": np.zeros((8, 8, 4))}, {"size": (16, 16)},
        {"progress": lambda done: None}, {"on_step": lambda step, guess: None}, {"negative_prompt": None},
        {"guidance": np.float32(3), "eta": np.array(0.5)}, {"schedule": "karras"}, {"guidance_rescale": 0.5},
        {"apg_eta": 0.0, "apg_norm_threshold": 3}, {"image": np.zeros((16, 16, 3), np.uint8), "strength": 0.5},
    ):  # fmt: skip
        for prompt in ("a dog", "a red apple on a blue background"):
            pipe(prompt, **{"steps": 3} | settings)
    assert denoise.count == before
    # A new size is a new program, and may be one that the denoiser halves to fractions.
    assert pipe("a dog", size=(14, 10), steps=2).shape == (1, 10, 14, 3)
    assert denoise.count == before + 1


@pytest.mark.parametrize("first", [{"guidance_interval": (0, 9)}, {"cache_interval": 2}])
def test_a_setting_that_has_a_program_of_its_own_has_one(pipe, first):
    pipe("a dog", steps=3, **first)
    before = denoise.count
    pipe("a dog", steps=7, **{"guidance_interval": (1.5, 2)} if "guidance_interval" in first else {"cache_interval": 5})
    assert denoise.count == before


def test_another_pipeline_of_the_same_configs_shares_the_program(pipe, model):
    pipe("a dog", steps=2)
    before = denoise.count
    Pipeline(model.with_params(jax.tree.map(lambda leaf: 0.9 * leaf, model.params)))("a dog", steps=2)
    assert denoise.count == before


# Devices and types ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_draws_about_the_same_image(pipe, model):
    half = Pipeline(model, dtype="bfloat16")("a dog", steps=3)
    assert np.abs(half.astype(int) - pipe("a dog", steps=3)).mean() < 12


@pytest.mark.slow
def test_images_spread_over_eight_devices_are_those_of_one(pipe, model):
    photo, mask = np.random.default_rng(5).integers(0, 256, (16, 16, 3), np.uint8), np.eye(16)
    spread = Pipeline(model, devices=jax.devices())
    for settings in ({}, {"image": photo, "mask": mask}):
        call = {"prompts": ["a dog", "blue"] * 4, "seed": 3, "steps": 3, "eta": 1.0, **settings}
        assert off(spread(**call), pipe(**call)) <= 1
    assert off(spread("a dog", steps=3), pipe("a dog", steps=3)) <= 1, "one image alone is drawn by each"


def test_params_are_on_the_device_in_the_type_they_are_computed_in_and_saved_as_they_were(model, tmp_path):
    half = Pipeline(model, dtype="bfloat16")
    types = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(half.params["vae"])}
    assert types["kernel"] == jnp.bfloat16
    assert types["scale"] == np.float32
    half.save(tmp_path / "half")
    jax.tree.map(np.testing.assert_array_equal, read_model(tmp_path / "half").params, model.params)


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_as_itself_from_a_folder_and_from_a_run(pipe, tmp_path):
    pipe.save(tmp_path / "run" / "export")
    for path in (tmp_path / "run" / "export", tmp_path / "run"):
        np.testing.assert_array_equal(jaxdiff.load(path)("a dog", steps=3), pipe("a dog", steps=3))


def test_a_loaded_pipeline_is_saved_whole_after_its_folder_is_gone(pipe, tmp_path):
    pipe.save(tmp_path / "first")
    loaded = jaxdiff.load(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    loaded.save(tmp_path / "second")
    again, prompts = read_model(tmp_path / "second"), ["A red apple, 3 dogs!"]
    np.testing.assert_array_equal(again.tokenizer(prompts), pipe.model.tokenizer(prompts))
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.model.params)


def test_a_models_own_settings_are_used_where_none_are_given_and_stay_with_it(pipe, model, tmp_path):
    own = Pipeline(replace(model, defaults={"guidance": 3, "steps": 4}))
    own.save(tmp_path / "own")
    expected = pipe("a dog", guidance=3, steps=4)
    for found in (own, jaxdiff.load(tmp_path / "own")):
        np.testing.assert_array_equal(found("a dog"), expected)
        np.testing.assert_array_equal(found("a dog", guidance=7.5, steps=3), pipe("a dog", steps=3))


def test_adapters_change_the_params_as_they_were_read_one_after_another(model, pipe, tmp_path):
    model.save(tmp_path / "model")
    little = np.float32(1 + 2**-9)  # which bfloat16 rounds to 1

    def kernel(params):
        return params["denoiser"]["conv_in"]["kernel"]

    def changed(by):
        def adapter(params):
            assert kernel(params).dtype == np.float32
            conv = params["denoiser"]["conv_in"]
            return {**params, "denoiser": {**params["denoiser"], "conv_in": {**conv, "kernel": by(conv["kernel"])}}}

        return adapter

    adapters = [changed(lambda leaf: leaf * little), changed(lambda leaf: leaf + 1)]
    loaded = jaxdiff.load(tmp_path / "model", "bfloat16", adapters=adapters)
    expected = (kernel(model.params) * little + 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel(loaded.params), expected)
    np.testing.assert_array_equal(kernel(loaded.model.params), kernel(model.params) * little + 1)


def test_networks_that_do_not_fit_together_are_refused_with_both_numbers(model):
    for role, change, words in (
        ("denoiser", {"in_channels": 7}, "7 channels.*4"),
        ("denoiser", {"cross_attention_dim": 32}, "cross_attention_dim is 32.*16"),
        ("text_encoder", {"vocab_size": 100}, "vocab_size 100"),
    ):
        network = model.networks[role]
        other = {**model.networks, role: Network(replace(network.config, **change), network.params)}
        with pytest.raises(ValueError, match=words):
            Pipeline(replace(model, networks=other))
    with pytest.raises(ValueError, match=r"dtype is 'int8'.*bfloat16"):
        Pipeline(model, dtype="int8")
    with pytest.raises(ValueError, match=r"dtype is 'float99'.*float16"):
        model.save("nowhere", dtype="float99")


def test_weights_that_do_not_fit_the_config_are_refused_by_name(model, tmp_path):
    params = {**model.params, "denoiser": {**model.params["denoiser"]}}
    del params["denoiser"]["conv_in"]
    model.with_params(params).save(tmp_path / "half")
    with pytest.raises(ValueError, match=r"half/unet: .*2 missing: conv_in.bias, conv_in.weight"):
        jaxdiff.load(tmp_path / "half")


def test_a_run_that_has_exported_no_model_yet_is_told_to_train_on(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="train on"):
        jaxdiff.load(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "config.json").write_text('{"task": {}}')
    with pytest.raises(ValueError, match="train on"):
        jaxdiff.load(tmp_path)
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match="text-to-image"):
        jaxdiff.load(tmp_path)
