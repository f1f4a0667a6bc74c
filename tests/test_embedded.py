"""The model that comes with the package."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.model import EMBEDDED
from jaxdiff.tools.evaluate import background_colour

COLOURS = ("blue", "red", "green", "yellow")
PROMPTS = [f"a red apple, noto style, on a {colour} background" for colour in COLOURS]


@pytest.fixture(scope="module")
def pipe():
    return jaxdiff.load()


def test_its_files_are_small_enough_to_come_along():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 25e6


@pytest.mark.slow
def test_it_draws_on_the_background_that_the_prompt_names_and_its_preview_has_the_colours(pipe):
    guesses = []
    images = pipe(PROMPTS, steps=6, on_step=lambda step, guess: guesses.append(guess))
    assert images.shape == (4, 64, 64, 3)
    assert [background_colour(image) for image in images] == list(COLOURS)
    factor = pipe.networks.factor
    preview = pipe.preview(guesses[-1]).astype(float)
    assert preview.shape == (4, 64 // factor, 64 // factor, 3)
    small = images.reshape(4, 64 // factor, factor, 64 // factor, factor, 3).mean((2, 4))
    assert np.corrcoef(preview.ravel(), small.ravel())[0, 1] > 0.9
