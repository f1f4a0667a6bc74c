"""The error of the guess on held-out images: closed forms, paired noise, and what captions tell."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.loader import open_source
from jaxdiff.data.record import Record
from jaxdiff.evaluation.denoising import LEVELS, Heldout, as_metrics, as_table, denoising_errors, heldout
from jaxdiff.evaluation.plots import plot_metrics
from jaxdiff.generation.pipeline import Pipeline

DATA = DataConfig(root=str(Path(__file__).parent / "data"), size=16, batch_size=8, flip=True, crop=0.5)


@pytest.fixture(scope="module")
def pictures() -> Heldout:
    return heldout(open_source(DATA), DATA, 6)


def test_what_is_held_out_is_spread_over_all_and_no_wrong_label_is_the_right_one():
    first, read = open_source(DATA).record(0), []

    class Many:
        def __len__(self) -> int:
            return 442

        def record(self, index: int) -> Record:
            read.append(index)
            return replace(first, caption=Caption(f"thing {index // 4}", "noto", drawing=True))

        def name(self, index: int) -> str:
            return str(index)

        def sizes(self) -> np.ndarray:
            return np.zeros((442, 2), int)

    source = Many()
    found = heldout(source, DATA, 300)
    assert len(found.images) == 300
    assert max(np.diff(read)) == 2
    assert read[-1] >= 440
    assert all(a != b for a, b in zip(found.captions["full"], found.captions["wrong"], strict=True))
    assert "wrong" not in heldout(source, DATA, 1).captions


@pytest.mark.parametrize(("change", "said"), [({"n": 0}, "n is 0"), ({"n": -5}, "n is -5")])
def test_no_images_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        heldout(open_source(DATA), DATA, **change)


def test_a_batch_of_none_and_latents_are_refused(pipe, pictures):
    for batch in (0, -3):
        with pytest.raises(ValueError, match=f"batch is {batch}"):
            denoising_errors(pipe, pictures, batch=batch)
    with pytest.raises(ValueError, match="latents"):
        heldout(open_source(DATA), DataConfig(source="latents", size=16), 4)


def silent(model):
    """A model whose network gives 0, whatever it is told."""
    params = dict(model.params)
    params["denoiser"] = params["denoiser"] | {"conv_out": jax.tree.map(jnp.zeros_like, params["denoiser"]["conv_out"])}
    return model.with_params(params)


def test_held_out_images_are_the_same_every_time_and_have_captions_of_four_kinds(pictures):
    again = heldout(open_source(DATA), DATA, 6)
    np.testing.assert_array_equal(again.images, pictures.images)
    assert again.captions == pictures.captions
    assert list(pictures.captions) == ["full", "unlabelled", "wrong", "empty"]
    for full, unlabelled, wrong in zip(*(pictures.captions[k] for k in ("full", "unlabelled", "wrong")), strict=True):
        assert full.endswith(unlabelled)
        assert wrong.endswith(unlabelled)
        assert full != wrong


def parts(pipe, images):
    """The latents of images, and the noise that they are measured with."""
    x_0 = pipe.encode(images)
    return x_0, jnp.asarray(np.random.default_rng(0).standard_normal(x_0.shape), jnp.float32)


def test_a_network_that_gives_0_has_the_error_of_its_prediction(model, pictures):
    """Of velocity: the guess is x / (1 + sigma^2) (Salimans & Ho 2022, D), whatever the caption."""
    assert model.scheduler.prediction_type == "v_prediction"
    pipe = Pipeline(silent(model))
    errors = denoising_errors(pipe, pictures, levels=(0.6, 10.0), batch=6)
    assert errors.keys() == pictures.captions.keys()
    x_0, eps = parts(pipe, pictures.images)
    for by_level in errors.values():
        for level, error in by_level.items():
            guess = (x_0 + level * eps) / (1 + level**2)
            assert error == pytest.approx(float(jnp.square(guess - x_0).mean()), rel=1e-3)


def test_errors_are_those_of_the_pipelines_own_denoiser_whatever_the_batch(pipe, pictures):
    short = replace(pictures, captions={"full": ["a dog", "a red star", "a cat"] * 2})
    x_0, eps = parts(pipe, short.images)
    guess = pipe.denoiser(short.captions["full"], guidance=1, size=(16, 16))
    expected = float(jnp.square(guess(x_0 + 2.5 * eps, 2.5) - x_0).mean())
    for batch in (6, 4):
        found = denoising_errors(pipe, short, levels=(2.5,), batch=batch)
        assert found["full"][2.5] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_of_a_model_that_reads_sizes_they_are_those_of_each_image(pictures):
    xl = Pipeline(tiny.xl_model())
    short = replace(pictures, captions={"full": ["a dog", "a red star", "a cat"] * 2, "empty": [""] * 6})
    x_0, eps = parts(xl, short.images)
    width, height = short.cuts[0].original_width, short.cuts[0].original_height
    guess = xl.denoiser(short.captions["full"], guidance=1, size=(16, 16), original_size=(width, height))
    expected = float(jnp.square(guess(x_0 + 2.5 * eps, 2.5) - x_0).mean())
    found = denoising_errors(xl, short, levels=(2.5,), batch=4)
    assert found["full"][2.5] == pytest.approx(expected, rel=1e-4)
    encoded = Pipeline(replace(xl.model, zero_empty=False))
    other = denoising_errors(encoded, short, levels=(2.5,), batch=4)
    assert other["full"] == found["full"]
    assert other["empty"][2.5] != pytest.approx(found["empty"][2.5], rel=1e-3)


def test_errors_become_metrics_a_table_and_a_plot():
    errors = {"full": dict.fromkeys(LEVELS, 0.25), "empty": dict.fromkeys(LEVELS, 0.5)}
    metrics = as_metrics(errors)
    assert metrics["error_full_0.6"] == 0.25
    assert metrics["error_empty_30"] == 0.5
    assert len(as_table(errors).splitlines()) == 3
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 2} | metrics]
    sizes = [Image.open(io.BytesIO(plot_metrics(part))).size for part in (lines, lines[:1])]
    assert sizes[0][0] > sizes[1][0] > 100
    assert json.loads(json.dumps(metrics)) == metrics
