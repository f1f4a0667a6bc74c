"""Many pictures from one pipeline: which are drawn at once, and that none is lost while they are written."""

import threading

import numpy as np
import pytest
from PIL import Image
from test_generate import model, pipe  # noqa: F401  (fixtures)

from jaxdiff.batch import batches, draw, draw_all, fill_in, told
from jaxdiff.rows import Line, Picture, Row, pictures


def wanted(*rows: dict) -> list[Picture]:
    return list(pictures(Line(i, Row.of({"steps": 2} | row)) for i, row in enumerate(rows, 1)))


def together(pipe, *rows: dict) -> list[str]:  # noqa: F811
    """The prompts of each batch."""
    return ["|".join(p.row.prompt for p in batch.pictures) for batch in batches(pipe, wanted(*rows))]


def test_pictures_of_one_size_are_drawn_together_whatever_their_images_were(pipe, tmp_path):  # noqa: F811
    for name, size in {"square": (16, 16), "large": (160, 160), "wide": (30, 16), "broken": (16, 16)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    rows = [{"prompt": name, "image": str(tmp_path / f"{name}.png")} for name in ("square", "wide", "large", "broken")]
    rows.append({"prompt": "sized", "image": str(tmp_path / "wide.png"), "size": (16, 16)})
    assert together(pipe, *rows) == ["square|large", "wide", "broken", "sized|sized"]  # as its program has it
    around = [{"prompt": f"p{k}", "image": str(tmp_path / "square.png"), "outpaint": (k, 0, 8 - k, 0)} for k in (0, 4)]
    assert together(pipe, *around) == ["p0|p4"]


def test_prompts_of_one_layout_are_drawn_together(pipe):  # noqa: F811
    long = "a red apple on a blue background " * 8
    rows = [{"prompt": text} for text in ("a dog", "a AND b", long, "(a:2)", "b AND a", "[a:b:0.5]")]
    assert together(pipe, *rows) == ["a dog|(a:2)", "a AND b|b AND a", long, "[a:b:0.5]"]


def test_large_pictures_are_drawn_by_fewer(pipe, monkeypatch):  # noqa: F811
    monkeypatch.setattr("jaxdiff.batch.BATCH_PIXELS", 1024)
    rows = [{"prompt": "a", "n": 8}, {"prompt": "b", "n": 3, "size": (32, 16)}, {"prompt": "c", "size": (64, 64)}]
    assert together(pipe, *rows) == ["a|a|a|a", "a|a|a|a", "b|b", "b|b", "c"]


def test_a_batch_is_what_the_pipeline_draws(pipe):  # noqa: F811
    those = wanted({"prompt": "a dog", "seed": 3}, {"prompt": "blue", "negative_prompt": "a dog", "seed": 9})
    expected = pipe(["a dog", "blue"], ["", "a dog"], [3, 9], steps=2)
    np.testing.assert_array_equal(draw(pipe, those), expected)
    image = expected[1]
    assert Row.of({k: v for k, v in told(pipe, those[1], image).items() if k in those[1].row.values()}) == those[1].row


def test_what_was_drawn_is_saved_and_told_in_order_whatever_ends_the_work(pipe):  # noqa: F811
    those = wanted(*({"prompt": "a", "steps": 1 + i % 2} for i in range(6)))
    for stop in (KeyboardInterrupt, ValueError("full")):
        lock, saved, heard = threading.Lock(), [], []

        def save(drawn, saved=saved, lock=lock, stop=stop):
            with lock:
                saved.append(drawn.picture.index)
            if drawn.picture.index == 5 and isinstance(stop, ValueError):
                raise stop
            return drawn.picture.index

        def more(images, stop=stop, heard=heard, saved=saved):
            if saved and not isinstance(stop, ValueError):
                raise stop

        with pytest.raises(stop if isinstance(stop, type) else ValueError):
            draw_all(pipe, those, save, saved=heard.append, progress=more)
        if isinstance(stop, ValueError):
            assert (sorted(saved), heard) == ([0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3])
        else:
            assert heard == sorted(saved) == [0, 2, 4]


def test_what_cannot_be_drawn_is_refused_and_its_neighbours_are_drawn(pipe, tmp_path):  # noqa: F811
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:45])
    rows = [{"prompt": name, "image": str(tmp_path / f"{name}.png"), "n": 2} for name in ("a", "cut")]
    those = wanted(*rows, rows[0])
    refused, drawn = [], []
    draw_all(pipe, those, drawn.append, refuse=lambda picture, error: refused.append((picture.line, str(error))))
    assert sorted(d.picture.index for d in drawn) == [0, 1, 4, 5]
    ((line, sentence),) = refused
    assert line == 2
    assert "cut.png cannot be read" in sentence
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        draw_all(pipe, those, drawn.append)


def test_wildcards_of_a_row_are_filled_in_by_each_pictures_seed(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(map(str, range(1000))))
    row = {"prompt": "__x__", "negative_prompt": "__x__", "n": 3, "to_prompt": "__x__",
           "regions": []}  # fmt: skip
    rows = [picture.row for picture in fill_in(wanted(row), tmp_path)]
    assert len({row.prompt for row in rows}) == 3
    assert all(row.to_prompt == row.prompt != row.negative_prompt for row in rows)
    assert rows == [picture.row for picture in fill_in(wanted(row), tmp_path)]
