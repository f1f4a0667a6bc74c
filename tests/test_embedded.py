"""The model that comes with the package."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.pipeline import EMBEDDED
from jaxdiff.tools.evaluate import background_colour

COLOURS = ("blue", "red", "green", "yellow")
PROMPTS = [f"a red apple, noto style, on a {colour} background" for colour in COLOURS]


@pytest.fixture(scope="module")
def pipe():
    return jaxdiff.load()


def test_its_files_are_small_enough_to_come_along():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 25e6


def test_it_draws_on_the_background_that_the_prompt_names(pipe):
    pictures = pipe(PROMPTS, steps=10)
    assert pictures.shape == (4, 64, 64, 3)
    assert [background_colour(picture) for picture in pictures] == list(COLOURS)


def test_it_draws_the_same_again_from_the_same_seed(pipe):
    np.testing.assert_array_equal(pipe(PROMPTS, seed=3, steps=1), pipe(PROMPTS, seed=3, steps=1))
