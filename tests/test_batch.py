"""Many images from one pipeline: which are drawn at once, and that none is lost while they are written."""

import threading

import numpy as np
import pytest
from PIL import Image

from jaxdiff.generation.batch.draw import batches, draw_all, metadata
from jaxdiff.generation.batch.files import Line
from jaxdiff.generation.batch.groups import Job, jobs_of
from jaxdiff.generation.conditioning import filled
from jaxdiff.generation.drawing import settled
from jaxdiff.generation.request import Request
from jaxdiff.prompts.wildcards import Wildcards


def wanted(*requests: dict) -> list[Job]:
    lines = (Line(i, Request.of({"steps": 2} | request)) for i, request in enumerate(requests, 1))
    return list(jobs_of(lines))


def together(pipe, *requests: dict) -> list[str]:
    """The prompts of each batch."""
    return ["|".join(job.request.prompt for job in batch.jobs) for batch in batches(pipe, wanted(*requests))]


def test_images_of_one_size_are_drawn_together_whatever_size_their_files_had(pipe, tmp_path):
    for name, size in {"square": (16, 16), "large": (160, 160), "wide": (30, 16), "broken": (16, 16)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    rows = [{"prompt": name, "image": str(tmp_path / f"{name}.png")} for name in ("square", "wide", "large", "broken")]
    rows.append({"prompt": "sized", "image": str(tmp_path / "wide.png"), "size": (16, 16)})
    assert together(pipe, *rows) == ["square|large", "wide", "broken", "sized|sized"]  # as its program has it
    around = [{"prompt": f"p{k}", "image": str(tmp_path / "square.png"), "outpaint": (k, 0, 8 - k, 0)} for k in (0, 4)]
    assert together(pipe, *around[:1], *around[:1]) == ["p0|p0"]


def test_prompts_of_one_layout_are_drawn_together(pipe):
    long = "a red apple on a blue background " * 8
    rows = [{"prompt": text} for text in ("a dog", "a AND b", long, "(a:2)", "b AND a", "[a:b:0.5]")]
    assert together(pipe, *rows) == ["a dog|(a:2)", "a AND b|b AND a", long, "[a:b:0.5]"]


def test_large_images_are_drawn_by_fewer(pipe, monkeypatch):
    monkeypatch.setattr("jaxdiff.generation.batch.draw.BATCH_PIXELS", 1024)
    rows = [{"prompt": "a", "n": 8}, {"prompt": "b", "n": 3, "size": (32, 16)}, {"prompt": "c", "size": (64, 64)}]
    assert together(pipe, *rows) == ["a|a|a|a", "a|a|a|a", "b|b", "b|b", "c"]


def test_what_an_image_says_of_itself_draws_it_again(pipe):
    jobs = wanted({"prompt": "a dog", "seed": 3}, {"prompt": "blue", "negative_prompt": "a dog", "seed": 9})
    drawn = []
    draw_all(pipe, jobs, drawn.append)
    np.testing.assert_array_equal(
        np.stack([one.image for one in sorted(drawn, key=lambda one: one.job.index)]),
        pipe(["a dog", "blue"], ["", "a dog"], [3, 9], steps=2),
    )
    for one in drawn:
        told = metadata(pipe, one.job.single, one.image)
        assert (told["width"], told["height"], told["model"], told["guidance"]) == (16, 16, "tiny", 7.5)
        again = Request.of({name: value for name, value in told.items() if name in vars(one.job.request)})
        assert again == settled(one.job.single, pipe.info)


def test_what_was_drawn_is_saved_and_told_in_order_whatever_ends_the_work(pipe):
    jobs = wanted(*({"prompt": "a", "steps": 1 + i % 2} for i in range(6)))
    for stop in (KeyboardInterrupt, ValueError("full")):
        lock, saved, heard = threading.Lock(), [], []

        def save(drawn, saved=saved, lock=lock, stop=stop):
            with lock:
                saved.append(drawn.job.index)
            if drawn.job.index == 5 and isinstance(stop, ValueError):
                raise stop
            return drawn.job.index

        def more(images, stop=stop, saved=saved):
            if saved and not isinstance(stop, ValueError):
                raise stop

        with pytest.raises(stop if isinstance(stop, type) else ValueError):
            draw_all(pipe, jobs, save, saved=heard.append, progress=more)
        if isinstance(stop, ValueError):
            assert (sorted(saved), heard) == ([0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3])
        else:
            assert heard == sorted(saved) == [0, 2, 4]


def test_what_cannot_be_drawn_is_refused_and_its_neighbours_are_drawn(pipe, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    rows = [{"prompt": name, "image": str(tmp_path / f"{name}.png"), "n": 2} for name in ("a", "cut")]
    jobs = wanted(*rows, rows[0])
    refused, drawn = [], []
    draw_all(pipe, jobs, drawn.append, refuse=lambda job, error: refused.append((job.line, str(error))))
    assert sorted(one.job.index for one in drawn) == [0, 1, 4, 5]
    ((line, sentence),) = refused
    assert line == 2
    assert "cut.png" in sentence
    with pytest.raises(ValueError, match=r"cut\.png"):
        draw_all(pipe, jobs, drawn.append)


def test_wildcards_are_filled_in_by_each_images_seed(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(map(str, range(1000))))
    asked = Request("__x__", "__x__", to_prompt="__x__", regions=(("__x__", (0, 0, 1, 1)),))
    found = [filled(asked, Wildcards(tmp_path), seed) for seed in (1, 2, 3, 1)]
    assert len({request.prompt for request in found[:3]}) == 3
    assert found[0] == found[3]
    for request in found:
        assert all(text.isdecimal() for text in (request.prompt, request.negative_prompt, request.regions[0].prompt))
        assert request.to_prompt == request.prompt != request.negative_prompt
