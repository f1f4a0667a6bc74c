"""IP-Adapters: an image stands beside the prompt, as much as is said. What diffusers draws: tests/parity."""

import functools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny import off

from jaxdiff import build
from jaxdiff.config import IPAdapterConfig, UNetConfig
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.programs import denoise, encode_image_prompts
from jaxdiff.generation.request import Request
from jaxdiff.io.convert import leaves, torch_views
from jaxdiff.io.ip_adapter import _RESAMPLER, read_ip_adapter
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.models.unet import cross_attentions

CHANNELS = tuple(channels for _, channels in cross_attentions(build.unet(tiny.UNET)))
PLAIN = IPAdapterConfig(
    channels=CHANNELS, cross_attention_dim=16, image_features=tiny.IMAGE_ENCODER.projection_dim, tokens=3
)
PLUS = replace(
    PLAIN, kind="plus", image_features=tiny.IMAGE_ENCODER.hidden_size, hidden=8, depth=2, inner=64, feedforward=12
)
FULL = replace(PLAIN, kind="full", image_features=tiny.IMAGE_ENCODER.hidden_size, tokens=4)
PHOTO = np.random.default_rng(0).integers(0, 256, (20, 16, 3)).astype(np.uint8)
OTHER = PHOTO[::-1].copy()

plain = functools.cache(tiny.model)


def tensors(config=PLAIN, seed=0):
    """By the names that files have."""
    found = torch_views(tiny.random_params("ip_adapter", config, np.random.default_rng(seed)))
    own = {name: theirs for theirs, name in _RESAMPLER.items()}
    pattern = re.compile(rf"(image_proj\.layers\.\d+)\.({'|'.join(own)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{own[m[2]]}.", name): array for name, array in found.items()}


def write_adapter(folder, config=PLAIN, seed=0, **others):
    """A file, and the image encoder beside it."""
    tiny.write_image_encoder(folder / "image_encoder")
    path = folder / f"{config.kind}-{seed}.safetensors"
    arrays = {name: one._replace(checked=False) for name, one in stored(tensors(config, seed) | others).items()}
    write_safetensors(path, arrays)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ip")
    return [write_adapter(folder, PLAIN, 0), write_adapter(folder, PLUS, 1)]


@pytest.fixture(scope="module")
def model(files):
    return plain().with_ip_adapters(files[:1])


@pytest.fixture(scope="module")
def pipe(model):
    return Pipeline(model)


def test_an_image_is_seen_and_at_a_scale_of_0_it_is_not(pipe):
    without = pipe("a dog", steps=3)
    np.testing.assert_array_equal(without, Pipeline(plain())("a dog", steps=3))
    assert off(pipe("a dog", steps=3, image_prompt=PHOTO), without) > 5
    assert off(pipe("a dog", steps=3, image_prompt=OTHER), pipe("a dog", steps=3, image_prompt=PHOTO)) > 2
    np.testing.assert_array_equal(pipe("a dog", steps=3, image_prompt=PHOTO, image_prompt_scale=0), without)


def test_a_scale_compiles_nothing(pipe):
    pipe("a dog", steps=3, image_prompt=PHOTO)
    counts = denoise.count, encode_image_prompts.count
    images = [pipe("a dog", steps=3, image_prompt=image, image_prompt_scale=scale)
              for image, scale in ((PHOTO, 0.3), (PHOTO, 1.7), (OTHER, -1))]  # fmt: skip
    assert (denoise.count, encode_image_prompts.count) == counts
    assert len({image.tobytes() for image in images}) == 3


def test_without_an_image_the_program_is_that_of_the_model_alone(pipe):
    Pipeline(plain())("a dog", steps=3)
    count = denoise.count
    pipe("a dog", steps=3)
    assert denoise.count == count


@pytest.mark.slow
def test_the_same_image_twice_is_the_image_once(pipe):
    """Attention over tokens that are there twice has the same mean."""
    once, twice = (pipe("a dog", steps=3, image_prompt=(PHOTO,) * n) for n in (1, 2))
    assert off(once, twice) <= 1
    both = pipe("a dog", steps=3, image_prompt=(PHOTO, OTHER))
    assert off(both, once) > 1
    assert off(both, pipe("a dog", steps=3, image_prompt=(OTHER, PHOTO))) <= 1


def test_two_adapters_add_up(files, pipe):
    two = Pipeline(plain().with_ip_adapters(files))
    asked = {"steps": 3, "image_prompt": (PHOTO, OTHER)}
    one = pipe("a dog", steps=3, image_prompt=PHOTO, image_prompt_scale=0.5)
    np.testing.assert_array_equal(two("a dog", image_prompt_scale=(0.5, 0), **asked), one)
    assert off(two("a dog", image_prompt_scale=0.5, **asked), one) > 2
    with pytest.raises(ValueError, match="There are 1 of image_prompt for 2 IP-Adapters; give one for each"):
        two("a dog", image_prompt=PHOTO)
    with pytest.raises(ValueError, match="There are 3 of image_prompt_scale for 2"):
        two("a dog", image_prompt_scale=(1, 1, 1), **asked)


@pytest.mark.slow
def test_images_of_a_batch_are_those_that_are_drawn_alone(pipe):
    both = pipe(["a dog", "a red apple"], steps=3, image_prompt=[PHOTO, OTHER], image_prompt_scale=0.8)
    for i, (prompt, image) in enumerate((("a dog", PHOTO), ("a red apple", OTHER))):
        assert off(pipe(prompt, seed=i, steps=3, image_prompt=image, image_prompt_scale=0.8)[0], both[i]) <= 1


@pytest.mark.slow
def test_devices_that_share_a_batch_draw_the_same(model, pipe):
    shared = Pipeline(model, devices=jax.devices()[:2])
    asked = {"steps": 3, "image_prompt": [PHOTO, OTHER]}
    assert off(shared(["a dog", "a red apple"], **asked), pipe(["a dog", "a red apple"], **asked)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"sampler": "dpmpp_2m"},
        {"image": OTHER[:16], "strength": 0.7},
        {"image": OTHER[:16], "mask": np.eye(16)},
        {"pag_scale": 2.0},
        {"cache_interval": 2},
        {"guidance_interval": (0.5, 5.0)},
        {"regions": [("a red apple", (0, 0, 0.5, 1))]},
        {"image": OTHER[:16], "invert": "ddim", "keep_layout": 0.5},
        {"to_prompt": "a red apple"},
        {"size": (48, 16), "tile": 16},
    ],
    ids=lambda asked: next(name for name in reversed(asked)),
)
def test_it_goes_with_other_features(pipe, asked):
    with_it = pipe("a dog", steps=3, image_prompt=PHOTO, image_prompt_scale=2.0, **asked)
    without = pipe("a dog", steps=3, **asked)
    assert off(with_it, without) > 2
    np.testing.assert_array_equal(pipe("a dog", steps=3, image_prompt=PHOTO, image_prompt_scale=0.0, **asked), without)


@pytest.mark.slow
def test_the_denoiser_as_a_function_sees_it(pipe):
    x = pipe.noise()
    without = pipe.denoiser("a dog")(x, 1.0)
    assert np.abs(pipe.denoiser("a dog", image_prompt=PHOTO)(x, 1.0) - without).max() > 1e-3
    np.testing.assert_array_equal(pipe.denoiser("a dog", image_prompt=PHOTO, image_prompt_scale=0.0)(x, 1.0), without)


@pytest.mark.slow
def test_little_memory_draws_nearly_the_same(model, pipe):
    low = Pipeline(model, memory="low")
    for _ in range(2):
        assert off(low("a dog", steps=2, image_prompt=PHOTO), pipe("a dog", steps=2, image_prompt=PHOTO)) <= 3


def test_requests_that_do_not_go_together_are_refused(pipe):
    with pytest.raises(ValueError, match="0 and 1 of image_prompt"):
        pipe.draw([Request("a", image_prompt=(PHOTO,)), Request("b")])
    with pytest.raises(ValueError, match="loaded with no IP-Adapter"):
        Pipeline(plain())("a dog", image_prompt=PHOTO)
    with pytest.raises(ValueError, match=r"image_prompt_scale is .* requires image_prompt"):
        pipe("a dog", image_prompt_scale=0.5)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, PLUS, FULL], ids=lambda config: config.kind)
def test_sizes_are_found_from_shapes(tmp_path, config):
    path = write_adapter(tmp_path, config)
    assert read_ip_adapter(path).config == config
    expected = dict(leaves(tiny.random_params("ip_adapter", config, np.random.default_rng(0))))
    found = dict(leaves(plain().with_ip_adapters([path]).ip_adapters[0].params))
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name])


OTHERS = {
    "channels": (replace(PLAIN, channels=(8, 8)), "It is for another model"),
    "prompts": (replace(PLAIN, cross_attention_dim=24), "It is for another model: its tokens have 24 features"),
    "images": (replace(PLAIN, image_features=20), "It is for another image encoder: it reads 20 features"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_for_another_model_is_refused(tmp_path, kind):
    config, words = OTHERS[kind]
    with pytest.raises(ValueError, match=words):
        plain().with_ip_adapters([write_adapter(tmp_path, config)])


FIRST = "ip_adapter.1.to_k_ip.weight"
DAMAGED = {
    "a tensor is missing": (lambda t: t.pop("image_proj.norm.weight"), r"1 missing: image_proj\.norm\.weight"),
    "a layer is missing": (lambda t: t.pop(FIRST), "not whole: ip_adapter.* is missing"),
    "a wrong shape": (lambda t: t.update({FIRST: np.zeros((8,), np.float32)}), "that many axes"),
    "nothing in a shape": (lambda t: t.update({FIRST: np.zeros((8, 0), np.float32)}), "must be above 0"),
    "not finite": (lambda t: t.update({FIRST: t[FIRST] * np.nan}), f"not finite: {FIRST}"),
    "no projection": (lambda t: t.pop("image_proj.proj.weight"), "FaceID|of no kind"),
    "a face's": (lambda t: t.update({"image_proj.proj.0.weight": t.pop("image_proj.proj.weight")}), "FaceID"),
    "a face's LoRA": (lambda t: t.update({"ip_adapter.0.to_q_lora.down.weight": np.zeros((1, 1), np.float32)}),
                      "FaceID"),
    "something else": (lambda t: [t.pop(name) for name in list(t) if "ip_adapter" in name], "is no IP-Adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_told(tmp_path, kind):
    change, words = DAMAGED[kind]
    change(found := dict(tensors()))
    tiny.write_image_encoder(tmp_path / "image_encoder")
    arrays = {name: one._replace(checked=False) for name, one in stored(found).items()}
    write_safetensors(tmp_path / "a.safetensors", arrays)
    with pytest.raises(ValueError, match=words) as told:
        plain().with_ip_adapters([tmp_path / "a.safetensors"])
    assert "a.safetensors" in str(told.value)


def test_shapes_of_files_are_never_trusted(tmp_path):
    """Tensors of any other shapes give a sentence."""
    rng = np.random.default_rng(0)
    tiny.write_image_encoder(tmp_path / "image_encoder")
    for config in (PLAIN, PLUS, FULL):
        whole = tensors(config)
        for _ in range(15):
            found = dict(whole)
            for name in rng.choice(sorted(found), 3):
                found[name] = np.zeros(rng.integers(0, 9, rng.integers(0, 5)), np.float32)
            arrays = {name: one._replace(checked=False) for name, one in stored(found).items()}
            write_safetensors(path := tmp_path / "a.safetensors", arrays)
            with pytest.raises(ValueError, match=str(path)):
                plain().with_ip_adapters([path])


def test_what_is_missing_is_told(tmp_path, files):
    lonely = tmp_path / "a.safetensors"
    lonely.write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="has no folder 'image_encoder' beside it"):
        plain().with_ip_adapters([lonely])
    assert plain().with_ip_adapters([lonely], files[0].parent / "image_encoder").image_encoder is not None
    with pytest.raises(ValueError, match="image_encoder is for IP-Adapters"):
        plain().with_ip_adapters([], files[0].parent / "image_encoder")
    with pytest.raises(ValueError, match="cannot be read"):
        read_ip_adapter(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="give its file"):
        plain().with_ip_adapters([3])


def test_files_of_published_models_have_as_many_layers():
    """As IP-Adapter's files for Stable Diffusion 1: 16, numbered from 1 to 31."""
    found = [channels for _, channels in cross_attentions(build.unet(UNetConfig()))]
    down = [320] * 2 + [640] * 2 + [1280] * 2
    assert found == down + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]


def test_cross_attentions_are_those_of_the_params():
    """Every one is named once, and has the channels that its keys have."""
    for unet in (tiny.UNET, replace(tiny.UNET, layers_per_block=(1, 2), transformer_layers_per_block=2)):
        params = build.param_shapes(build.unet(unet), unet)
        found = cross_attentions(build.unet(unet))
        named = {path[:-2] for path, _ in leaves(params) if path[-3:-1] == ("attn2", "to_k")}
        assert {path for path, _ in found} == named
        assert len(found) == len(named)
        for path, channels in found:
            node = params
            for name in path:
                node = node[name]
            assert node["to_k"]["kernel"].shape[-1] == channels
