"""Captions: what parts they keep, and their grammar."""

import collections
import itertools

import numpy as np
import pytest

from jaxdiff.data.captions import COLOURS, Caption, background, with_article

APPLE = Caption("red apple", "noto", ("fruit", "food"), "orange")


def test_a_full_caption_names_label_style_and_background():
    assert APPLE.full() == "red apple, noto style, on an orange background"
    assert Caption("red apple", "noto").full() == "red apple, noto style"


def test_every_colour_is_told_from_every_other():
    assert len(COLOURS) >= 8
    distances = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(COLOURS.values(), 2)]
    assert min(distances) > 90


def test_drawn_captions_are_only_ever_made_of_the_parts():
    captions = {APPLE.draw(np.random.default_rng(i)) for i in range(2000)}
    for caption in captions:
        rest = (
            caption.removesuffix(" on an orange background").removesuffix(",").removesuffix("on an orange background")
        )
        rest = rest.removesuffix("noto style").removesuffix(", ")
        assert rest in {"", "red apple", "a red apple", "fruit", "food", "red apple, fruit", "red apple, food"}, caption
    assert {"a red apple", "red apple", "red apple, noto style, on an orange background"} <= captions
    assert "a red apple on an orange background" in captions
    assert "" not in captions


def test_each_part_is_dropped_about_as_often_as_said():
    counts = collections.Counter()
    for i in range(4000):
        caption = APPLE.draw(np.random.default_rng(i))
        counts.update(
            {"style": "noto style" in caption, "colour": "orange" in caption, "label": "red apple" in caption}
        )
    assert abs(counts["style"] / 4000 - 0.75) < 0.03
    assert abs(counts["colour"] / 4000 - 0.75) < 0.03
    assert 0.88 < counts["label"] / 4000 < 0.94


def test_a_users_own_text_is_never_changed_but_for_the_background():
    text = "My dog Rex; 3 of 7"
    assert {Caption(text).draw(np.random.default_rng(i)) for i in range(50)} == {text}
    drawn = {Caption(text, colour="blue").draw(np.random.default_rng(i)) for i in range(50)}
    assert drawn == {text, f"{text}, on a blue background"}


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("red apple", "a red apple"),
        ("orange book", "an orange book"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("ewe", "a ewe"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("cross", "a cross"),
        ("men holding hands", "men holding hands"),
        ("cat with tears of joy", "a cat with tears of joy"),
        ("person: blond hair", "a person: blond hair"),
        ("OK hand", "OK hand"),
        ("eight o\u2019clock", "eight o\u2019clock"),
    ],
)
def test_the_article_goes_by_sound_and_number(label, said):
    assert with_article(label) == said


def test_the_background_phrase_has_its_article():
    assert background("orange") == "on an orange background"
    assert background("blue") == "on a blue background"
