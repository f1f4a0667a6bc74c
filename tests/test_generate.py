"""The pipeline, on a whole random model that is tiny."""

import inspect
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.generate import text_to_image
from jaxdiff.io.folder import Folder, read_folder, write_folder
from jaxdiff.models.unet import prompt_keys
from jaxdiff.pipeline import Pipeline, _check_memory

CONFIGS = {
    "unet": UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    "vae": VAEConfig(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ),
    "text_encoder": CLIPTextConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
    ),
}
SCHEDULER = SchedulerConfig(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
    clip_sample=False, prediction_type="v_prediction",
)  # fmt: skip


def random_params(name: str, rng: np.random.Generator) -> dict:
    """Params drawn by NumPy: compiling the networks' own initialisation takes longer than the tests."""
    config = CONFIGS[name]

    def draw(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return np.full(leaf.shape, float(path[-1].key == "scale"), np.float32)
        # A fresh text encoder says nearly the same of every prompt; loud embeddings make prompts differ.
        spread = 1.0 if path[-1].key == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
        return (spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, build.param_shapes(getattr(build, name)(config), config))


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.train(["a red apple on a blue background", "a dog"] * 9, 520, 24)
    rng = np.random.default_rng(0)
    params = {name: random_params(name, rng) for name in CONFIGS}
    return Folder(**CONFIGS, scheduler=SCHEDULER, params=params, tokenizer=tokenizer)  # pyright: ignore


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model)


def off(a, b) -> int:
    """The largest difference, of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_pictures_are_uint8_of_the_models_own_size(pipe):
    images = pipe(["a dog"], steps=2)
    assert images.shape == (1, 16, 16, 3)
    assert images.dtype == np.uint8
    assert images.std() > 0


def test_nothing_a_user_turns_compiles_again(pipe):
    pipe(["a dog"])
    before = text_to_image.count
    noise = np.zeros((1, 8, 8, 4), np.float32)
    for settings in (
        {"seed": 5}, {"steps": 1}, {"steps": 7}, {"steps": 999}, {"guidance": 1.0}, {"guidance": 30.0}, {"eta": 1.0},
        {"negative_prompt": "a blue background"}, {"latents": noise}, {"size": (16, 16)},
        {"progress": lambda done: None}, {"sampler": "ddim"}, {"negative_prompt": None},
        {"guidance": np.float32(3)}, {"guidance": jnp.bfloat16(3)}, {"guidance": 3, "eta": np.array(0.5)},
    ):  # fmt: skip
        for prompt in ("a dog", "a red apple on a blue background"):
            pipe([prompt], **{"steps": 3} | settings)
    assert text_to_image.count == before
    # A new size is a new program, and may be one that the UNet halves to fractions.
    assert pipe(["a dog"], size=(14, 10), steps=2).shape == (1, 10, 14, 3)
    assert text_to_image.count == before + 1


def test_another_pipeline_of_the_same_configs_shares_the_program(pipe, model):
    pipe(["a dog"], steps=2)
    before = text_to_image.count
    Pipeline(replace(model, params=jax.tree.map(lambda p: 0.9 * p, model.params)))(["a dog"], steps=2)
    assert text_to_image.count == before


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipe):
    settings = {"steps": 3, "eta": 0.7}
    first = pipe(["a dog"], seed=3, **settings)
    np.testing.assert_array_equal(first, pipe(["a dog"], seed=3, **settings))
    assert off(first, pipe(["a dog"], seed=4, **settings)) > 8


def test_picture_i_of_a_batch_is_the_picture_of_its_own_prompt_and_seed(pipe):
    prompts = ["a dog", "a red apple", "blue"]
    together = pipe(prompts, seed=7, steps=4, eta=1.0, guidance=4.0)
    for i, prompt in enumerate(prompts):
        alone = pipe([prompt], seed=7 + i, steps=4, eta=1.0, guidance=4.0)[0]
        assert off(together[i], alone) <= 1, "batched convolutions round differently, and no more"
    assert off(together[0], together[1]) > 8


def test_given_latents_stand_in_for_the_seeds_noise(pipe):
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    first = pipe(["a dog"], latents=noise, seed=0, steps=3)
    np.testing.assert_array_equal(first, pipe(["a dog"], latents=noise, seed=9, steps=3))
    assert off(first, pipe(["a dog"], latents=-noise, steps=3)) > 8
    assert pipe(["a dog"], latents=noise[:, :5, :7], steps=3).shape == (1, 10, 14, 3), "latents say the size"


def test_guidance_of_one_follows_the_prompt_and_nothing_else(pipe):
    one = pipe(["a dog"], guidance=1.0, steps=3)
    np.testing.assert_array_equal(one, pipe(["a dog"], guidance=1.0, steps=3, negative_prompt="a red apple"))
    assert off(one, pipe(["a red apple"], guidance=1.0, steps=3)) > 0


def test_guidance_of_zero_follows_the_negative_prompt(pipe):
    zero = pipe(["a dog"], guidance=0.0, steps=3, negative_prompt="a red apple")
    assert off(zero, pipe(["a red apple"], guidance=1.0, steps=3)) <= 1


def test_negative_prompts_matter_and_may_be_one_for_each(pipe):
    prompts = ["a dog", "a red apple", "blue"]
    plain = pipe(prompts, steps=3)
    steered = pipe(prompts, steps=3, negative_prompt=["", "blue background", ""])
    assert [off(a, b) > 0 for a, b in zip(plain, steered, strict=True)] == [False, True, False]


@pytest.mark.parametrize("settings", [{}, pytest.param({"cache_interval": 2}, marks=pytest.mark.slow)])
def test_guidance_at_all_levels_is_plain_guidance_and_at_none_it_is_a_scale_of_one(pipe, settings):
    settings = {"steps": 5, "eta": 0.5, "negative_prompt": "a red apple"} | settings
    plain, one = (pipe(["a dog"], guidance=guidance, **settings) for guidance in (7.5, 1.0))
    np.testing.assert_array_equal(pipe(["a dog"], guidance_interval=(0, np.inf), **settings), plain)
    np.testing.assert_array_equal(pipe(["a dog"], guidance_interval=(0, 0), **settings), one)
    some = pipe(["a dog"], guidance_interval=(0.3, 3), **settings)
    assert off(some, plain) > 0
    assert off(some, one) > 0


def test_intervals_compile_nothing_once_there_is_one(pipe):
    for fixed in ({"guidance_interval": (0, 9)}, {"cache_interval": 2}):
        pipe(["a dog"], steps=3, **fixed)
        before = text_to_image.count
        turned = {
            name: value for name, value in (("guidance_interval", (1.5, 2)), ("cache_interval", 5)) if name in fixed
        }
        pipe(["a dog"], steps=7, **turned)
        assert text_to_image.count == before


def test_features_kept_for_one_step_are_not_kept(pipe):
    np.testing.assert_array_equal(pipe(["a dog"], steps=4, cache_interval=1), pipe(["a dog"], steps=4))


def test_features_kept_over_steps_draw_nearly_the_same_picture_with_any_batch_and_progress(pipe):
    settings = {"steps": 24, "cache_interval": 2, "eta": 0.5, "guidance": 2.0}
    exact = pipe(["a dog"], **settings | {"cache_interval": 1})
    kept = pipe(["a dog"], **settings)
    assert (
        0
        < np.abs(kept.astype(int) - exact).mean()
        < np.abs(pipe(["a dog"], **settings, seed=1).astype(int) - exact).mean()
    )
    told = []
    np.testing.assert_array_equal(pipe(["a dog"], **settings, progress=told.append), kept)
    assert told == [*range(4, 21, 4), 24], "pieces end where features are computed anew"
    pair = pipe(["a dog", "blue"], **settings)
    assert off(pair[0], kept[0]) <= 1


@pytest.fixture(scope="module")
def unet(model):
    """(apply, params, x, t, context) of the random model's UNet."""
    rng = np.random.default_rng(1)
    x, context = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 8, 8, 4), (2, 12, 16)))
    apply = jax.jit(build.unet(model.unet).apply, static_argnames="only_deep")
    return apply, jax.tree.map(jnp.asarray, model.params["unet"]), x, jnp.full(2, 500.0), context


def test_keys_and_values_made_once_of_the_prompt_give_what_the_prompt_gives(unet):
    apply, params, x, t, context = unet
    out = apply({"params": params}, x, t, context)
    kept = prompt_keys(params, context, jnp.float32)
    assert len(jax.tree.leaves(kept)) == 2 * 4, "one transformer down, one in the middle and two up"
    np.testing.assert_allclose(apply({"params": params, "prompt": kept}, x, t, 0 * context), out, atol=1e-6)


def test_deep_features_of_the_same_input_give_the_same_output(unet):
    apply, params, x, t, context = unet
    deep = apply({"params": params}, x, t, context, only_deep=True)
    out = apply({"params": params}, x, t, context)
    np.testing.assert_allclose(apply({"params": params}, x, t, context, deep), out, atol=1e-6)
    assert np.abs(apply({"params": params}, x, t, context, 0 * deep) - out).max() > 0.1


def test_progress_is_told_to_the_end_and_changes_no_pixel(pipe):
    told = []
    watched = pipe(["a dog"], steps=23, eta=0.5, progress=told.append)
    assert told == [*range(3, 22, 3), 23]
    np.testing.assert_array_equal(watched, pipe(["a dog"], steps=23, eta=0.5))


@pytest.mark.slow
def test_bfloat16_draws_about_the_same_picture(pipe, model):
    half = Pipeline(model, dtype="bfloat16")(["a dog"], steps=3)
    assert np.abs(half.astype(int) - pipe(["a dog"], steps=3)).mean() < 12


def test_a_saved_pipeline_loads_as_itself_from_a_folder_and_from_a_run(pipe, tmp_path):
    pipe.save(tmp_path / "run" / "export")
    for path in (tmp_path / "run" / "export", tmp_path / "run"):
        np.testing.assert_array_equal(jaxdiff.load(path)(["a dog"], steps=3), pipe(["a dog"], steps=3))


def test_a_loaded_pipeline_is_saved_whole_after_its_folder_is_gone(pipe, tmp_path):
    pipe.save(tmp_path / "first")
    loaded = jaxdiff.load(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    loaded.save(tmp_path / "second")
    prompts = ["A red apple, 3 dogs!"]
    np.testing.assert_array_equal(jaxdiff.load(tmp_path / "second").tokenizer(prompts), pipe.tokenizer(prompts))
    with pytest.raises(ValueError, match="dtype is 'float99'; choose float32, float16 or bfloat16"):
        inspect.unwrap(Pipeline.save)(pipe, tmp_path / "third", dtype="float99")


def test_a_run_without_a_model_yet_is_told_to_train_on(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has not exported a model yet; train on to its first evaluation"):
        jaxdiff.load(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "config.json").write_text('{"task": {}}')
    with pytest.raises(ValueError, match="has not exported a model yet"):
        jaxdiff.load(tmp_path)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"prompts": []}, "No prompt was given"),
    ({"negative_prompt": ["", ""]}, "There are 2 negative prompts for 1 prompts"),
    ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 1000"),
    ({"steps": -5}, "steps is -5"),
    ({"guidance": float("nan")}, "guidance is nan; it must be a finite number"),
    ({"guidance": float("inf")}, "guidance is inf"),
    ({"eta": 1.5}, "eta is 1.5; it must lie from 0 to 1"),
    ({"seed": -1}, "seed is -1; it must lie from 0 to 4294967295"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"guidance_interval": (3, 1)}, "guidance_interval is (3, 1); it must be two noise levels"),
    ({"guidance_interval": (-1, 1)}, "guidance_interval is (-1, 1)"),
    ({"guidance_interval": (0, float("nan"))}, "guidance_interval is (0, nan)"),
    ({"guidance_interval": 3}, "guidance_interval is 3"),
    ({"guidance_interval": ("a", "b")}, "guidance_interval is ('a', 'b')"),
    ({"cache_interval": 0}, "cache_interval is 0; it must be at least 1"),
    ({"cache_interval": 2.0}, "cache_interval is 2.0; it must be a whole number"),
    ({"sampler": "dddim"}, "Unknown sampler 'dddim'; did you mean 'ddim'?"),
    ({"size": (15, 16)}, "size is 15x16; both sides must be multiples of 2"),
    ({"size": (0, 16)}, "size is 0x16"),
    ({"size": (16, 1_000_000)}, "a side may have 8192 pixels at most"),
    ({"latents": np.zeros((2, 8, 8, 4))}, r"latents have the shape \(2, 8, 8, 4\); it must be \(1, 8, 8, 4\)"),
    ({"latents": np.zeros((1, 4, 8, 8))}, r"it must be \(1, 4, 8, 4\): images, height, width, channels"),
    ({"latents": np.zeros((8, 8, 4))}, "latents have the shape"),
    ({"latents": np.zeros((1, 8, 8, 4)), "size": (16, 8)}, r"it must be \(1, 4, 8, 4\)"),
    ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents must be an array of finite numbers"),
    ({"latents": np.full((1, 8, 8, 4), "a")}, "latents must be an array of finite numbers"),
    ({"latents": np.zeros((1, 8, 8, 4), complex)}, "latents must be an array of finite numbers"),
    ({"latents": [[1], [1, 2]]}, "latents must be an array of finite numbers"),
    ({"prompts": None}, "A prompt is None; it must be text"),
    ({"prompts": 5}, "A prompt is 5; it must be text"),
    ({"prompts": b"x"}, "A prompt is b'x'; it must be text"),
    ({"negative_prompt": [None]}, "A prompt is None; it must be text"),
    ({"size": 64}, r"size is 64; it must be \(width, height\), in pixels"),
    ({"size": (64,)}, r"size is \(64,\); it must be \(width, height\)"),
    ({"size": "64by64"}, "size is '64by64'; write it as WIDTHxHEIGHT, such as 64x64"),
    ({"size": (16.0, 16)}, "size is 16.0; it must be a whole number"),
    ({"prompts": ["a"] * 999, "size": (8192, 8192)}, "999 x 8192x8192 pixels need 4291 GB at least, this machine has"),
    ({"sampler": None}, "Unknown sampler None; it has ddim"),
    ({"grid": "karas"}, "Unknown schedule 'karas'; did you mean 'karras'?"),
    ({"sampler": "lcm", "grid": "karras"}, "The sampler lcm cannot use the schedule 'karras'; it can use: model."),
    ({"sampler": "euler", "eta": 1.0}, "eta is 1, which the sampler euler does not take; it is for ddim and tcd."),
    ({"sampler": ["ddim"]}, r"Unknown sampler \['ddim'\]; did you mean"),
    ({"guidance": "7"}, "guidance is '7'; it must be a finite number"),
    ({"guidance": 1j}, "guidance is 1j"),
    ({"steps": True}, "steps is True; it must be a whole number"),
    ({"guidance": 10**400}, "guidance is 1000"),
    ({"guidance": [1.0, 2.0]}, "guidance is "),
    ({"eta": None}, "eta is None; it must lie from 0 to 1"),
])  # fmt: skip
def test_bad_arguments_are_refused_in_a_sentence(pipe, settings, sentence):
    call = inspect.unwrap(Pipeline.__call__)  # as a user has it, without the tests' own checks of types
    with pytest.raises(
        ValueError, match=sentence.replace("?", r"\?") if "interval" not in sentence else re.escape(sentence)
    ):
        call(pipe, **{"prompts": ["a dog"]} | settings)


def test_what_overflows_is_told_and_not_drawn_black(pipe):
    with pytest.raises(ValueError, match=r"with guidance 1e\+30, float32 overflowed"):
        pipe("a dog", guidance=1e30, steps=3)


def test_a_size_that_dense_attention_would_not_fit_is_not_refused(model):
    # 2 prompts x 2 heads x 16384 tokens squared were 4 GB of scores once; in blocks they take what a picture takes.
    _check_memory(model, 64, (128, 128, 4), np.dtype(np.float32))


def test_params_lie_on_the_device_in_the_type_they_are_computed_in_and_are_saved_as_they_were(model, tmp_path):
    half = Pipeline(model, dtype="bfloat16")
    types = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(half.params["vae"])}
    assert types["kernel"] == jnp.bfloat16
    assert types["scale"] == np.float32
    half.save(tmp_path / "half")
    saved = read_folder(tmp_path / "half").params
    jax.tree.map(np.testing.assert_array_equal, saved, model.params)


def test_parts_that_do_not_fit_together_are_refused(model):
    for part, sentence in (
        ({"unet": replace(model.unet, in_channels=8)}, "The UNet takes 8 channels and gives 4"),
        ({"unet": replace(model.unet, cross_attention_dim=32)}, "cross_attention_dim is 32, the text encoder's"),
        ({"text_encoder": replace(model.text_encoder, vocab_size=100)}, "more than the text encoder's vocab_size 100"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Pipeline(replace(model, **part))
    with pytest.raises(ValueError, match="dtype is 'int8'; supported: float32, bfloat16"):
        Pipeline(model, dtype="int8")


def test_weights_that_do_not_fit_the_config_are_refused_by_name(model, tmp_path):
    params = {**model.params, "unet": {**model.params["unet"]}}
    del params["unet"]["conv_in"]
    write_folder(tmp_path / "half", replace(model, params=params))
    with pytest.raises(ValueError, match=r"half/unet: .*2 missing: conv_in.bias, conv_in.weight"):
        jaxdiff.load(tmp_path / "half")
    (tmp_path / "run" / "export").mkdir(parents=True)
    with pytest.raises(ValueError, match="has exported no whole text-to-image model"):
        jaxdiff.load(tmp_path / "run")
