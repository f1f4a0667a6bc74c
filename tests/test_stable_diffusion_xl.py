"""Stable Diffusion XL: two text encoders, sizes, and a refiner. What diffusers draws: tests/parity/test_xl.py."""

import json

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.families import StableDiffusionXL
from jaxdiff.io.single_file import write_single
from jaxdiff.model import read_model

ASKED = {"steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def model():
    return tiny.xl_model()


@pytest.fixture(scope="module")
def pipe(model):
    return jaxdiff.Pipeline(model)


@pytest.mark.slow
def test_image_i_of_a_batch_is_the_image_of_its_own_prompt_and_seed(pipe):
    prompts = ["a red apple", "a dog", "(a dog:1.3) AND a red apple on a " + "blue " * 30]
    together = pipe(prompts, ["", "a dog", ""], seed=5, **ASKED)
    alone = [pipe(prompt, negative, seed=5 + i, **ASKED)[0] for i, (prompt, negative) in enumerate(
        zip(prompts, ["", "a dog", ""], strict=True))]  # fmt: skip
    assert tiny.off(together, np.stack(alone)) <= 1


def test_sizes_crops_and_an_empty_negative_prompt_change_the_image(pipe):
    plain = pipe("a dog", **ASKED)
    for changed in ({"original_size": (8, 8)}, {"crop": (4, 0)}, {"crop": (0, 4)}, {"negative_prompt": " "}):
        assert tiny.off(pipe("a dog", **ASKED, **changed), plain) > 2
    size, none = {"original_size": "16x16"}, {"crop": (0, 0)}
    np.testing.assert_array_equal(pipe("a dog", **ASKED, **size, **none), plain)


def test_empty_negative_prompts_are_encoded_where_the_model_says_so(pipe):
    encoded = jaxdiff.Pipeline(tiny.xl_model(zero_empty=False))
    np.testing.assert_array_equal(encoded("a dog", **ASKED), encoded("a dog", " ", **ASKED))
    np.testing.assert_array_equal(encoded("a dog", " ", **ASKED), pipe("a dog", " ", **ASKED))


@pytest.mark.slow
def test_a_model_that_refines_itself_draws_as_if_alone(model, pipe):
    refined = jaxdiff.Pipeline(model, refiner=jaxdiff.Pipeline(model))
    wanted = {"steps": 6, "guidance": 4.0, "seed": 3}
    steps: list[int] = []
    for start in (0.0, 0.5, 1.0, None):
        got = refined("a dog", **wanted, refiner_start=start, progress=steps.append)
        assert tiny.off(got, pipe("a dog", **wanted)) <= 1
        assert steps == sorted(steps)
        assert steps.pop() == 6
        steps.clear()
    image = pipe("a red apple", **ASKED)[0]
    for more in ({"image": image, "strength": 0.5}, {"image": image, "mask": np.tri(16, dtype=np.float32)}):
        assert tiny.off(refined("a dog", **wanted, **more), pipe("a dog", **wanted, **more)) <= 1


@pytest.mark.slow
def test_another_refiner_changes_the_image(model, pipe):
    refined = jaxdiff.Pipeline(model, refiner=jaxdiff.Pipeline(tiny.xl_model(seed=1)))
    assert tiny.off(refined("a dog", **ASKED, refiner_start=0.5), pipe("a dog", **ASKED)) > 2


def test_a_saved_model_is_the_same(model, pipe, tmp_path):
    pipe.save(tmp_path / "model")
    again = read_model(tmp_path / "model")
    assert (again.family, again.zero_empty) == (model.family, model.zero_empty)
    words = ["wow! a dog!!!", "a red apple"]
    for ours, theirs in zip(again.tokenizers, model.tokenizers, strict=True):
        np.testing.assert_array_equal(ours(words), theirs(words))
    np.testing.assert_array_equal(jaxdiff.Pipeline(again)("a dog!", **ASKED), pipe("a dog!", **ASKED))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refiner_start": 0.5}, "refiner_start is for a model with a refiner"),
        ({"aesthetic_score": 5.0}, "aesthetic_score is 5.0; this model does not read it"),
        ({"crop": (-1, 0)}, "crop is -1"),
        ({"crop": 3}, "crop is 3; it must be two whole numbers"),
        ({"original_size": (0.5, 1)}, "original_size is 0.5"),
        ({"original_size": (0, -5)}, "original_size is 0; .* from 1 to"),
        ({"original_size": (10**30, 1)}, "from 1 to"),
        ({"aesthetic_score": 1e308}, "from 0 to 100"),
        ({"clip_skip": 1}, "from 0 to 0"),
    ],
)
def test_what_the_model_does_not_read_is_refused(pipe, fields, words):
    with pytest.raises(ValueError, match=words):
        pipe("a dog", **ASKED, **fields)


def test_other_models_read_no_sizes():
    other = jaxdiff.Pipeline(tiny.model())
    for fields in ({"original_size": (8, 8)}, {"crop": (1, 1)}):
        with pytest.raises(ValueError, match="does not read it"):
            other("a dog", **ASKED, **fields)


def test_networks_that_do_not_fit_together_are_refused(model):
    with pytest.raises(ValueError, match="other latents"):
        jaxdiff.Pipeline(model, refiner=jaxdiff.Pipeline(tiny.model(vae=tiny.replace(tiny.VAE, scaling_factor=0.7))))
    with pytest.raises(ValueError, match="reads a mask"):
        jaxdiff.Pipeline(tiny.model(), refiner=jaxdiff.Pipeline(tiny.inpainting_model()))
    wrong = tiny.replace(model.configs["denoiser"], projection_class_embeddings_input_dim=30)
    networks = dict(model.networks) | {"denoiser": model.networks["denoiser"]._replace(config=wrong)}
    with pytest.raises(ValueError, match="it must be 36"):
        jaxdiff.Pipeline(tiny.replace(model, networks=networks))


@pytest.mark.parametrize(("file", "name", "value"), [
    ("text_encoder_2/config.json", "projection_dim", -1),
    ("text_encoder_2/config.json", "num_hidden_layers", 10**9),
    ("unet/config.json", "transformer_layers_per_block", [1, 10**9]),
    ("vae/config.json", "layers_per_block", 10**9),
    ("model_index.json", "is_cosxl_edit", True),
    ("model_index.json", "force_zeros_for_empty_prompt", "yes"),
])  # fmt: skip
def test_absurd_values_of_a_folder_are_refused_at_once(model, tmp_path, file, name, value):
    model.save(tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"{name} is"):
        read_model(tmp_path / "model")


def test_a_tokenizer_is_for_the_refiner_in_a_single_file_too(model, pipe, tmp_path):
    networks = {name: model.networks[role] for role, name in StableDiffusionXL.FOLDERS.items()}
    write_single(tmp_path / "one.safetensors", networks, model.scheduler)
    model.tokenizer.save(tmp_path / "words")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer"):
        jaxdiff.load(tmp_path / "model", refiner=tmp_path / "one.safetensors")
    loaded = jaxdiff.load(tmp_path / "model", refiner=tmp_path / "one.safetensors", tokenizer=tmp_path / "words")
    assert loaded.refiner is not None
