"""Control networks: an image that is followed, by as much as is said and at the steps that are said."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import off

from jaxdiff import build
from jaxdiff.config import ControlNetConfig, T2IAdapterConfig, from_dict, to_dict
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.programs import denoise
from jaxdiff.generation.request import Request
from jaxdiff.io.control import read_control
from jaxdiff.io.convert import torch_views
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.models.t2i_adapter import halved

SIZES = to_dict(tiny.UNET) | {"conditioning_embedding_out_channels": [4, 6]}
CONFIG = from_dict(ControlNetConfig, SIZES, "config")
PHOTO = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
OTHER = PHOTO[::-1].copy()


plain = functools.cache(tiny.model)


def params(config=CONFIG, seed=0):
    return tiny.random_params("controlnet", config, np.random.default_rng(seed))


def write_folder(folder, seed=0, config=CONFIG, **others):
    """A folder as diffusers writes it."""
    folder.mkdir(exist_ok=True)
    values = to_dict(config) | {"_class_name": "ControlNetModel"} | others
    for name in ("up_block_types", "out_channels", "sample_size", "mid_block_scale_factor", "center_input_sample"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", stored(torch_views(params(config, seed))))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write_folder(tmp_path_factory.mktemp("control") / str(i), i) for i in range(2)]


@pytest.fixture(scope="module")
def model(folders):
    """The tiny model with one control network."""
    return plain().with_controls(folders[:1])


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model)


def test_an_image_is_followed_and_at_a_scale_of_0_it_is_not(pipe):
    without = pipe("a dog", steps=3)
    assert off(pipe("a dog", steps=3, control_image=PHOTO), without) > 5
    assert off(pipe("a dog", steps=3, control_image=OTHER), pipe("a dog", steps=3, control_image=PHOTO)) > 5
    np.testing.assert_array_equal(pipe("a dog", steps=3, control_image=PHOTO, control_scale=0), without)


def test_numbers_compile_nothing(pipe):
    pipe("a dog", steps=3, control_image=PHOTO)
    pipe("a dog", steps=3, control_image=PHOTO, control_end=0.5)
    count = denoise.count
    images = [pipe("a dog", steps=3, control_image=PHOTO, control_scale=scale) for scale in (0.3, 1.7, -1)]
    images += [
        pipe("a dog", steps=3, control_image=PHOTO, control_start=a, control_end=b) for a, b in ((0.3, 1), (0, 0.7))
    ]
    assert denoise.count == count
    assert len({image.tobytes() for image in images}) == 5


def test_before_its_start_and_after_its_end_it_is_not_followed(pipe):
    steps: dict[str, list] = {"plain": [], "late": [], "early": []}

    def draw(name, **more):
        pipe("a dog", steps=4, on_step=lambda _, guess: steps[name].append(np.asarray(guess)), **more)

    draw("plain")
    draw("late", control_image=PHOTO, control_start=0.5)
    draw("early", control_image=PHOTO, control_end=0.25)
    for i in range(4):
        np.testing.assert_equal(np.array_equal(steps["late"][i], steps["plain"][i]), i < 2)
    assert np.abs(steps["early"][0] - steps["plain"][0]).max() > 1e-3


@pytest.mark.slow
def test_images_of_a_batch_are_those_that_are_drawn_alone(pipe):
    both = pipe(["a dog", "a red apple"], steps=3, control_image=[PHOTO, OTHER], control_scale=0.8)
    for i, (prompt, image) in enumerate((("a dog", PHOTO), ("a red apple", OTHER))):
        alone = pipe(prompt, seed=i, steps=3, control_image=image, control_scale=0.8)[0]
        assert off(alone, both[i]) <= 1


@pytest.mark.slow
def test_devices_that_share_a_batch_draw_the_same(model, pipe):
    shared = Pipeline(model, devices=jax.devices()[:2])
    asked = {"steps": 3, "control_image": [PHOTO, OTHER], "control_end": 0.7}
    assert off(shared(["a dog", "a red apple"], **asked), pipe(["a dog", "a red apple"], **asked)) <= 1


def test_two_networks_add_up(folders, pipe):
    two = Pipeline(plain().with_controls(folders))
    asked = {"steps": 3, "control_image": (PHOTO, OTHER)}
    one = pipe("a dog", steps=3, control_image=PHOTO, control_scale=0.5)
    np.testing.assert_array_equal(two("a dog", control_scale=(0.5, 0), **asked), one)
    assert off(two("a dog", control_scale=0.5, **asked), one) > 5
    with pytest.raises(
        ValueError, match=r"There are 1 of control_image, and .* 2 control networks; give an image for each"
    ):
        two("a dog", control_image=PHOTO)


@pytest.mark.slow
def test_in_guess_mode_the_negative_prompt_is_without_it(pipe):
    """So that without guidance nothing but the rising scales is new."""
    asked = {"steps": 2, "control_image": PHOTO}
    assert off(pipe("a dog", control_guess=True, **asked), pipe("a dog", **asked)) > 2
    far = {"guidance": 1.0, "control_guess": True, "control_scale": 0.0}
    np.testing.assert_array_equal(pipe("a dog", **far, **asked), pipe("a dog", steps=2, guidance=1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"sampler": "dpmpp_2m"},
        {"image": OTHER, "strength": 0.7},
        {"image": OTHER, "mask": np.eye(16)},
        {"pag_scale": 2.0},
        {"guidance_interval": (0.5, 5.0)},
        {"regions": [("a red apple", (0, 0, 0.5, 1))]},
        {"image": OTHER, "invert": "ddim", "keep_layout": 0.5},
        {"to_prompt": "a red apple"},
        {"apg_eta": 0.5, "apg_momentum": -0.5},
    ],
    ids=lambda asked: next(name for name in reversed(asked)),
)
def test_it_goes_with_other_features(pipe, asked):
    with_it = pipe("a dog", steps=3, control_image=PHOTO, control_scale=2.0, **asked)
    without = pipe("a dog", steps=3, **asked)
    assert off(with_it, without) > 2
    np.testing.assert_array_equal(pipe("a dog", steps=3, control_image=PHOTO, control_scale=0.0, **asked), without)


@pytest.mark.slow
def test_tiles_follow_their_own_part_of_the_image(pipe):
    """What one end of a wide image is steered by does not reach the other."""
    wide = np.concatenate([PHOTO, PHOTO, PHOTO], axis=1)
    other = np.concatenate([PHOTO, PHOTO, OTHER], axis=1)
    x = pipe.noise(size=(48, 16))
    asked = {"size": (48, 16), "tile": 16}
    one, two = (pipe.denoiser("a dog", control_image=image, **asked)(x, 1.0) for image in (wide, other))
    assert np.abs(one[:, :, 16:] - two[:, :, 16:]).max() > 1e-2
    np.testing.assert_allclose(one[:, :, :8], two[:, :, :8], atol=1e-5)


@pytest.mark.slow
def test_the_size_is_that_of_the_control_image_where_nothing_else_gives_one(pipe, tmp_path):
    from PIL import Image

    assert pipe("a dog", steps=1, control_image=np.zeros((16, 32, 3), np.uint8)).shape == (1, 16, 32, 3)
    Image.new("RGB", (100, 50)).save(path := tmp_path / "a.png")
    assert pipe("a dog", steps=1, control_image=path).shape == (1, 16, 32, 3)
    assert pipe("a dog", steps=1, control_image=path, size=(16, 16)).shape == (1, 16, 16, 3)
    assert pipe("a dog", steps=1, control_image=path, image=PHOTO).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_the_denoiser_as_a_function_follows_it(pipe):
    x = pipe.noise()
    without = pipe.denoiser("a dog")(x, 1.0)
    followed = pipe.denoiser("a dog", control_image=PHOTO)(x, 1.0)
    assert np.abs(followed - without).max() > 1e-3
    np.testing.assert_array_equal(pipe.denoiser("a dog", control_image=PHOTO, control_scale=0.0)(x, 1.0), without)


@pytest.mark.slow
def test_little_memory_draws_nearly_the_same(model, pipe):
    low = Pipeline(model, memory="low")
    for _ in range(2):
        assert off(low("a dog", steps=2, control_image=PHOTO), pipe("a dog", steps=2, control_image=PHOTO)) <= 3


def test_requests_with_and_without_are_told_apart(pipe):
    with pytest.raises(ValueError, match="control_image is given for some"):
        pipe.draw([Request("a", control_image=(PHOTO,)), Request("b")])
    with pytest.raises(ValueError, match="loaded with no control network"):
        Pipeline(plain())("a dog", control_image=PHOTO)
    with pytest.raises(ValueError, match=r"leave out cache_interval or control_image"):
        pipe("a dog", control_image=PHOTO, cache_interval=2)


# T2I-Adapters ---------------------------------------------------------------------------------------------------------

T2I = T2IAdapterConfig(channels=(8, 16), num_res_blocks=1, downscale_factor=2)


def write_adapter(folder, config=T2I, **others):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config) | {"_class_name": "T2IAdapter"} | others))
    found = tiny.random_params("t2i_adapter", config, np.random.default_rng(0))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", stored(torch_views(found)))
    return folder


def test_a_t2i_adapters_image_is_followed_beside_a_control_network(folders, tmp_path):
    pipe = Pipeline(plain().with_controls([write_adapter(tmp_path / "t2i"), folders[0]]))
    asked = {"steps": 2, "control_image": (PHOTO, OTHER)}
    scales = {scale: pipe("a dog", control_scale=scale, **asked) for scale in ((0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5))}
    np.testing.assert_array_equal(scales[0, 0], Pipeline(plain())("a dog", steps=2))
    assert len({image.tobytes() for image in scales.values()}) == 4
    with pytest.raises(ValueError, match="cannot be cut into tiles"):
        pipe("a dog", tile=16, **asked)


ADAPTERS = {
    "channels": ({"channels": [8, 8]}, "It is for another model: its features have channels"),
    "levels": ({"channels": [8]}, "It is for another model"),
    "pixels": ({"downscale_factor": 4}, "It is for another model"),
    "a quarter of 6": ({"adapter_type": "light_adapter", "channels": [6, 8]}, "must be multiples of 4"),
    "another kind": ({"adapter_type": "x"}, "adapter_type"),
    "grey": ({"in_channels": 1}, "in_channels"),
    "nothing": ({"channels": []}, "is empty"),
    "other weights": ({"num_res_blocks": 2}, "missing: adapter.body.0.resnets.1"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_t2i_adapter_that_does_not_fit_is_told(tmp_path, kind):
    values, words = ADAPTERS[kind]
    with pytest.raises(ValueError, match=words):
        plain().with_controls([write_adapter(tmp_path / "t2i", **values)])


def test_a_t2i_adapter_is_read_as_a_file_beside_its_config_alone(tmp_path):
    folder = write_adapter(tmp_path / "t2i")
    file = folder / "diffusion_pytorch_model.safetensors"
    assert read_control(file).config == read_control(folder).config == T2I
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="a T2I-Adapter; give its folder"):
        read_control(file)


def test_means_at_an_odd_edge_are_of_the_pixels_that_are_there():
    x = np.arange(15, dtype=np.float32).reshape(1, 3, 5, 1)
    expected = [[[[3.0], [5.0], [6.5]], [[10.5], [12.5], [14.0]]]]
    np.testing.assert_array_equal(halved(jnp.asarray(x)), expected)


# Files ----------------------------------------------------------------------------------------------------------------


def bare(tmp_path, tensors, name="net.safetensors", **values):
    arrays = {k: s._replace(checked=False) for k, s in stored(tensors).items()}
    write_safetensors(tmp_path / name, arrays)
    return tmp_path / name


def test_a_file_beside_its_config_is_the_folder(folders):
    whole, file = read_control(folders[0]), read_control(folders[0] / "diffusion_pytorch_model.safetensors")
    assert file.config == whole.config == replace(CONFIG, sample_size=whole.config.sample_size)
    jax.tree.map(np.testing.assert_array_equal, file.params, whole.params)


OTHERS = {
    "channels": (replace(CONFIG, block_out_channels=(8, 8)), r"its block_out_channels is \(8, 8\), and this"),
    "layers": (replace(CONFIG, layers_per_block=2), "layers_per_block"),
    "prompts": (replace(CONFIG, cross_attention_dim=24), "cross_attention_dim is 24, and this model's 16"),
    "latents": (replace(CONFIG, in_channels=9), "in_channels is 9, and this model's 4"),
    "pixels": (replace(CONFIG, conditioning_embedding_out_channels=(4, 4, 4)), "pixels to a latent pixel is 4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_network_for_another_model_is_refused(tmp_path, kind):
    config, words = OTHERS[kind]
    with pytest.raises(ValueError, match=words):
        plain().with_controls([write_folder(tmp_path / "other", config=config)])


def tensors():
    return torch_views(params())


FIRST = "down_blocks.0.resnets.0.conv1.weight"
DAMAGED = {
    "a tensor is missing": (lambda t: t.pop(FIRST), f"1 missing: {FIRST}"),
    "a wrong shape": (lambda t: t.update({FIRST: np.zeros((8, 8, 1, 1), np.float32)}), f"1 misshapen: {FIRST}"),
    "absurd sizes": (lambda t: t.update({FIRST: np.zeros((0, 2**40, 3, 3), np.float32)}), "misshapen"),
    "not finite": (lambda t: t.update({FIRST: t[FIRST] * np.nan}), f"not finite: {FIRST}"),
    "no float": (lambda t: t.update({FIRST: t[FIRST].astype(np.int32)}), "not float16"),
    "one inside another": (lambda t: t.update({"conv_in.kernel.x": np.zeros(1, np.float32)}), "conv_in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_told(tmp_path, kind):
    change, words = DAMAGED[kind]
    folder = write_folder(tmp_path / "net")
    change(found := tensors())
    bare(folder, found, "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=words) as told:
        plain().with_controls([folder])
    assert str(folder) in str(told.value)


def test_what_a_network_has_no_use_for_is_told_and_left_out(tmp_path, caplog):
    folder = write_folder(tmp_path / "net")
    bare(folder, tensors() | {"strange.weight": np.zeros(3, np.float32)}, "diffusion_pytorch_model.safetensors")
    plain().with_controls([folder])
    assert "strange" in caplog.text


CONFIGS = {
    "another class": ({"_class_name": "ControlNetXSAdapter"}, "the class is \"ControlNetXSAdapter\"; supported"),
    "another order": ({"controlnet_conditioning_channel_order": "gbr"}, "controlnet_conditioning_channel_order"),
    "no widths": ({"conditioning_embedding_out_channels": []}, "is empty"),
    "a width of 0": ({"conditioning_embedding_out_channels": [4, 0]}, "conditioning_embedding_out_channels"),
    "another block": ({"down_block_types": ["X", "DownBlock2D"]}, "down_block_types"),
    "no names": ({"down_block_types": 3}, "down_block_types must be a list of names"),
    "four channels": ({"conditioning_channels": 4}, "conditioning_channels"),
    "classes": ({"class_embed_type": "timestep"}, "class_embed_type"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_not_supported_is_told(tmp_path, kind):
    values, words = CONFIGS[kind]
    with pytest.raises(ValueError, match=words):
        read_control(write_folder(tmp_path / "net", **values))


def test_what_is_no_control_network_is_told_with_what_it_seems_to_be(tmp_path):
    for name, words in (
        ("lora_unet_x.lora_down.weight", "a LoRA"), ("x", "seems to be none"), ("emb_params", "a textual inversion"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_control(bare(tmp_path, {name: np.zeros((2, 2), np.float32)}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_control(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="has no config"):
        read_control(tmp_path)
    with pytest.raises(ValueError, match=r"is not whole: .* is missing"):
        read_control(bare(tmp_path, {"input_hint_block.0.weight": np.zeros((4, 3, 3, 3), np.float32)}))
    for wrong in (3, None, ("a", 0.5)):
        with pytest.raises(ValueError, match="give its folder or file"):
            plain().with_controls([wrong])


def test_shapes_of_files_without_a_config_are_never_trusted(tmp_path):
    """Tensors of any other shapes give a sentence."""
    rng, whole = np.random.default_rng(0), tensors()
    for _ in range(20):
        found = dict(whole)
        for name in rng.choice(sorted(found), 3):
            found[name] = np.zeros(rng.integers(0, 9, rng.integers(0, 5)), np.float32)
        path = bare(tmp_path, found)
        with pytest.raises(ValueError, match=str(path)):
            plain().with_controls([path])


def test_a_module_is_made_of_the_unets_own_parts():
    """The way down of both has the same names and shapes."""
    unet = build.param_shapes(build.unet(tiny.UNET), tiny.UNET)
    control = build.param_shapes(build.controlnet(CONFIG), CONFIG)
    shared = {name for name in unet if not name.startswith(("up_", "conv_norm_out", "conv_out"))}
    assert {name: unet[name] for name in shared} == {name: control[name] for name in control if name in shared}
    assert all(name.startswith("controlnet_") for name in control.keys() - shared)
