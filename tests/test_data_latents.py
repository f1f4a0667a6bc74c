"""Latents that were encoded before training."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS
from jaxdiff.data.latents import LatentSource, cache_latents
from jaxdiff.data.loader import batches, open_source

CONFIG = DataConfig(root=str(Path(__file__).parent / "data"), size=16, batch_size=10)


def encode(images: np.ndarray) -> np.ndarray:
    """Stands in for a VAE: the means are every fourth pixel, the variances are 1."""
    means = images[:, ::4, ::4]
    return np.concatenate([means, np.zeros_like(means)], -1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "deep" / "latents.array_record"
    assert cache_latents(encode, CONFIG, open_source(CONFIG), path, variants=3, seed=0) == 0
    return path


def test_every_variant_of_every_picture_is_there_with_its_caption(cached):
    pictures, source = open_source(CONFIG), LatentSource(cached)
    assert len(source) == 3 * len(pictures)
    seen = [source.record(i) for i in range(len(source))]
    assert {r.moments.shape for r in seen if r.moments is not None} == {(4, 4, 6)}
    captions = [pictures.record(i).caption for i in range(len(pictures))]
    assert [r.caption.label for r in seen] == [c.label for c in captions] * 3
    assert [r.caption.keywords for r in seen] == [c.keywords for c in captions] * 3
    colours = {tuple(r.caption.colour for r in seen[i :: len(pictures)]) for i in range(len(pictures))}
    assert len(colours) > 50  # the three variants differ in their backgrounds


def test_the_stored_colour_is_the_one_that_was_encoded(cached):
    source = LatentSource(cached)
    for i in range(len(source)):
        record = source.record(i)
        assert record.moments is not None
        corner = (record.moments[0, 0, :3].astype(np.float32) + 1) * 127.5
        # A drawing that reaches into the corner blends there, but with no other background.
        nearest = min(COLOURS, key=lambda name: np.abs(corner - COLOURS[name]).sum())
        assert nearest == record.caption.colour


def test_the_loader_gives_moments_and_composes_captions_anew(cached):
    config = DataConfig(source="latents", root=str(cached), batch_size=16)
    captions: list[str] = []

    def tokenize(texts):
        captions.extend(texts)
        return np.zeros((len(texts), 2), np.int32)

    read = batches(config, open_source(config), tokenize, seed=0)
    for batch in islice(read, 60):
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "moments": ((16, 4, 4, 6), "float32"),
            "tokens": ((16, 2), "int32"),
            "index": ((16,), "int64"),
        }
    read.close()
    assert len(set(captions)) > 400


def test_caching_again_gives_the_same_file(cached, tmp_path):
    cache_latents(encode, CONFIG, open_source(CONFIG), tmp_path / "again.array_record", variants=3, seed=0)
    a, b = LatentSource(cached), LatentSource(tmp_path)
    assert len(a) == len(b)
    for i in range(len(a)):
        np.testing.assert_array_equal(a.record(i).moments, b.record(i).moments)
        assert a.record(i).caption == b.record(i).caption


def test_a_cache_that_was_broken_off_is_not_there(tmp_path):
    calls = []

    def fail(images):
        calls.append(images)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)

    path = tmp_path / "latents.array_record"
    with pytest.raises(KeyboardInterrupt):
        cache_latents(fail, CONFIG, open_source(CONFIG), path, variants=1, seed=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no cached latents"):
        LatentSource(path)


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    path = tmp_path / "latents.array_record"
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(ValueError, match="cannot be read as cached latents"):
        LatentSource(path)


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    for i in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a dog")
    (tmp_path / "4.png").write_bytes(b"no picture")
    config = DataConfig(source="folder", root=str(tmp_path), size=16, batch_size=4, max_bad_share=0.2)
    path = tmp_path / "latents.array_record"
    assert cache_latents(encode, config, open_source(config), path, variants=2, seed=0, dtype="float32") == 1
    assert len(LatentSource(path)) == 8
