"""Latents that were encoded before training."""

import dataclasses
import hashlib
import re
import runpy
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxdiff import build
from jaxdiff.config import DataConfig, VAEConfig
from jaxdiff.data import latents
from jaxdiff.data.captions import COLOURS
from jaxdiff.data.images import prepare
from jaxdiff.data.latents import LatentSource, cache_latents, identity
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.record import BadRecord
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.training import encode as encode_module
from jaxdiff.training.tasks.diffusion import diffusion_task, drop_captions

CONFIG = DataConfig(root=str(Path(__file__).parent / "data"), size=16, batch_size=10)


def encode(images: np.ndarray) -> np.ndarray:
    """Stands in for a VAE: the means are every fourth pixel, the variances are 1."""
    means = images[:, ::4, ::4]
    return np.concatenate([means, np.zeros_like(means)], -1)


def encode_texts(texts: list[str]) -> tuple[np.ndarray]:
    """Stands in for a text encoder: [b, 3, 2], its first value the text's length, its second a checksum."""
    rows = [[len(text), sum(text.encode()) % 2000] for text in texts]
    return (np.repeat(np.array(rows, np.float32)[:, None], 3, 1),)


def encode_texts_twice(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Stands in for two text encoders: there is a vector [b, 4] for each text, too."""
    (context,) = encode_texts(texts)
    return context, np.repeat(context[:, 0, ::-1], 2, axis=1)


def cache(folder: Path, config: DataConfig = CONFIG, variants: int = 3, **options) -> int:
    return cache_latents(encode, config, open_source(config), folder, variants=variants, seed=0, **options)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Several parts even of few pictures."""
    monkeypatch.setattr(latents, "PART_RECORDS", 150)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "deep" / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "PART_RECORDS", 150)
        assert cache(folder) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


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


def test_any_number_of_processes_makes_the_same_files(cached, tmp_path):
    assert [path.name for path in sorted(cached.iterdir())] == [
        f"part-0000{i}-of-00003.array_record" for i in range(3)
    ]  # 3 * 131 records
    for i in range(2):
        cache(tmp_path, process_index=i, process_count=2)
        assert len(list(tmp_path.iterdir())) == (2, 3)[i]
    assert digests(tmp_path) == digests(cached)


def test_a_cache_that_was_broken_off_goes_on_where_it_was(cached, tmp_path):
    calls = []

    def fail(images):
        calls.append(images)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(fail, CONFIG, open_source(CONFIG), tmp_path, variants=3, seed=0)
    assert digests(tmp_path).items() < digests(cached).items()
    assert len(digests(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"lacks part-00001-of-00003\.array_record.* in all 2 of its 3 parts"):
        LatentSource(tmp_path)
    first = (tmp_path / "part-00000-of-00003.array_record").stat().st_mtime_ns
    cache(tmp_path)
    assert digests(tmp_path) == digests(cached)
    assert (tmp_path / "part-00000-of-00003.array_record").stat().st_mtime_ns == first


@pytest.mark.parametrize("damage", ["truncated", "empty", "replaced", "its index flipped"])
def test_a_damaged_part_is_named_with_what_to_do(cached, tmp_path, damage):
    shutil.copytree(cached, tmp_path, dirs_exist_ok=True)
    part = tmp_path / "part-00001-of-00003.array_record"
    data = bytearray(part.read_bytes())
    if damage == "its index flipped":
        data[data.rindex(b'"shapes"')] ^= 1
    part.write_bytes({"truncated": data[:-5000], "empty": b"", "replaced": b"<html>" * 1000}.get(damage, bytes(data)))
    with pytest.raises(ValueError, match=r"part-00001-of-00003\.array_record is damaged.* Delete it, and"):
        LatentSource(tmp_path)
    with pytest.raises(ValueError, match=r"part-00001-of-00003\.array_record is damaged.* Delete it, and"):
        cache(tmp_path)
    part.unlink()
    cache(tmp_path)
    assert digests(tmp_path) == digests(cached)


def test_a_damaged_record_is_named_by_its_part(cached, tmp_path):
    shutil.copytree(cached, tmp_path, dirs_exist_ok=True)
    part = tmp_path / "part-00001-of-00003.array_record"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    source, whole, bad = LatentSource(tmp_path), LatentSource(cached), []
    for i in range(len(source)):
        try:
            np.testing.assert_array_equal(source.record(i).moments, whole.record(i).moments)
        except BadRecord as error:
            bad.append(f"{source.name(i)} {error}")
    assert len(bad) == 1
    assert all(re.search(r"part-00001-of-00003\.array_record record \d+ .*delete this part", text) for text in bad)


def test_records_are_named_by_their_part(cached):
    source = LatentSource(cached)
    assert [source.name(i).partition("part-")[2] for i in (0, 149, 150, 392)] == [
        "00000-of-00003.array_record record 0",
        "00000-of-00003.array_record record 149",
        "00001-of-00003.array_record record 0",
        "00002-of-00003.array_record record 92",
    ]


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no cached latents"):
        LatentSource(tmp_path)


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    for i in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a dog")
    (tmp_path / "4.png").write_bytes(b"no picture")
    config = DataConfig(source="folder", root=str(tmp_path), size=16, batch_size=4, max_bad_share=0.2)
    for _ in range(2):  # made, and found
        assert cache(tmp_path / "latents", config, 2, dtype="float32") == 1
    assert len(LatentSource(tmp_path / "latents")) == 8


def test_encoded_captions_are_read_in_place_of_tokens(tmp_path):
    cache(tmp_path, variants=1, text_fn=encode_texts, text_variants=5)
    source, captions = LatentSource(tmp_path), set()
    for i in range(len(source)):
        record = source.record(i)
        assert {(c.shape, c.dtype.name) for c in record.contexts} == {((3, 2), "float16")}
        drawn = [record.caption.draw(np.random.default_rng([0, 0, i, k])) for k in range(5)]
        np.testing.assert_array_equal(np.stack(record.contexts), *encode_texts(drawn))
        captions |= set(drawn)
    assert len(captions) > 400
    config = DataConfig(source="latents", root=str(tmp_path), batch_size=16)
    whole, again = (batches(config, source, seed=0, start_step=s) for s in (0, 3))
    read = list(islice(whole, 5))
    for batch, same in zip(read[3:], islice(again, 2), strict=True):
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "moments": ((16, 4, 4, 6), "float32"),
            "context": ((16, 3, 2), "float16"),
            "index": ((16,), "int64"),
        }
        assert all((batch[name] == same[name]).all() for name in batch)
    parts = [batches(config, source, seed=0, process_index=i, process_count=4) for i in range(4)]
    for batch in read:
        joined = [next(part) for part in parts]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in joined]), batch[name])
    for reader in (whole, again, *parts):
        reader.close()


def test_vectors_of_captions_stay_with_their_contexts(tmp_path):
    cache(tmp_path, variants=1, text_fn=encode_texts_twice, text_variants=3)
    source = LatentSource(tmp_path)
    for i in range(0, len(source), 10):
        record = source.record(i)
        drawn = [record.caption.draw(np.random.default_rng([0, 0, i, k])) for k in range(3)]
        for found, wanted in zip((record.contexts, record.pooled), encode_texts_twice(drawn), strict=True):
            np.testing.assert_array_equal(np.stack(found), wanted)
    with closing(batches(DataConfig(source="latents", root=str(tmp_path), batch_size=16), source, seed=0)) as read:
        batch = next(read)
    assert (batch["pooled"].shape, batch["pooled"].dtype.name) == ((16, 4), "float16")
    np.testing.assert_array_equal(batch["pooled"], np.repeat(batch["context"][:, 0, ::-1], 2, axis=1))


def test_latents_keep_the_size_of_their_image_and_where_it_was_cut(tmp_path):
    config = dataclasses.replace(CONFIG, crop=0.5, flip=True)
    cache(tmp_path, config, variants=2)
    pictures, source = open_source(config), LatentSource(tmp_path)
    for i in range(0, len(source), 7):
        variant, index = divmod(i, len(pictures))
        _, _, cut = prepare(pictures.record(index), np.random.default_rng([0, variant, index]), config, (16, 16))
        assert source.record(i).numbers == cut
    read_config = dataclasses.replace(config, source="latents", root=str(tmp_path))
    with closing(batches(read_config, source, seed=0, numbers=True)) as read:
        batch = next(read)
    assert (batch["numbers"].shape, batch["numbers"].dtype.name) == ((10, 6), "float32")
    assert len(np.unique(batch["numbers"], axis=0)) > 5


def test_latents_that_do_not_tell_their_images_sizes_are_refused_where_they_are_read(cached):
    class Old:
        """As versions wrote them that kept no sizes."""

        def __init__(self):
            self.source = LatentSource(cached)

        def __getattr__(self, name):
            return getattr(self.source, name)

        def __len__(self):
            return len(self.source)

        def record(self, index):
            return dataclasses.replace(self.source.record(index), numbers=())

    config = DataConfig(source="latents", root=str(cached), batch_size=4)
    with closing(batches(config, Old(), seed=0, numbers=True)) as read, pytest.raises(ValueError, match="cache the"):
        next(read)


def test_latents_of_several_shapes_are_read_one_shape_a_batch(tmp_path):
    for i in range(30):
        Image.new("RGB", (32, 16) if i % 3 else (16, 16), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text("x")
    config = DataConfig(source="folder", root=str(tmp_path), size=16, batch_size=4, aspects=("1:1", "2:1"),
                        side_multiple=8)  # fmt: skip
    assert cache(tmp_path / "latents", config, 2) == 0
    read_config = dataclasses.replace(config, source="latents", root=str(tmp_path / "latents"))
    source = LatentSource(tmp_path / "latents")
    read = batches(read_config, source, seed=0)
    seen: dict[tuple[int, ...], list[int]] = {}
    for batch in islice(read, 15):
        numbers = ((batch["moments"][:, 0, 0, 0] + 1) * 127.5).round().astype(int).tolist()
        seen.setdefault(batch["moments"].shape, []).extend(numbers)
    read.close()
    assert {shape: sorted(numbers) for shape, numbers in seen.items()} == {
        (4, 4, 4, 6): sorted([i for i in range(30) if i % 3 == 0] * 2),
        (4, 2, 6, 6): sorted([i for i in range(30) if i % 3] * 2),
    }
    with pytest.raises(ValueError, match=r"set DataConfig\.aspects, size and side_multiple as they were"):
        batches(dataclasses.replace(read_config, aspects=()), source, seed=0)


def test_captions_are_dropped_alike_as_tokens_and_encoded():
    tokens, empty, table = (
        np.arange(1, 241).reshape(40, 6),
        np.zeros(6, int),
        np.random.default_rng(0).normal(size=(241, 3)),
    )
    key, index = jax.random.key(0), jnp.arange(40)
    dropped = np.asarray(drop_captions(jnp.asarray(tokens), jnp.asarray(empty), 0.5, key, index))
    assert 5 < (dropped == 0).all(1).sum() < 35
    contexts = drop_captions(jnp.asarray(table[tokens]), jnp.asarray(table[empty]), 0.5, key, index)
    np.testing.assert_allclose(np.asarray(contexts), table[dropped], rtol=1e-6)


@pytest.mark.slow
def test_a_step_on_encoded_captions_has_the_loss_of_one_on_their_tokens():
    spec = runpy.run_path(str(Path(__file__).parent / "configs" / "tiny.py"))["config"]().task
    spec = dataclasses.replace(spec, caption_dropout=0.5)
    vae = VAEConfig()  # only its scale counts here
    tokens = np.random.default_rng(0).integers(0, 598, (6, 12)).astype(np.int32)
    empty = np.full(12, 599, np.int32)
    batch = {"moments": np.random.default_rng(1).normal(size=(6, 8, 8, 8)).astype(np.float32), "index": np.arange(6)}

    # Frozen weights are in `frozen` where a step encodes the captions, and nowhere where they are encoded already.
    module = build.text_encoder(spec.text_encoder)
    weights = build.init(module, spec.text_encoder, jax.random.key(0))
    apply = jax.jit(lambda tokens: module.apply({"params": weights}, tokens))
    contexts = np.asarray(apply(np.concatenate([tokens, empty[None]])))
    spec = dataclasses.replace(spec, train_text_encoder=False)
    losses = []
    for frozen, caption in (
        ({"empty_tokens": empty, "text_encoder": weights}, {"tokens": tokens}),
        ({"empty_tokens": empty, "empty_context": contexts[-1]}, {"context": contexts[:-1].astype(np.float16)}),
    ):
        task = diffusion_task(spec, vae, frozen)
        params = task.init(jax.random.key(1))
        assert set(params) == {"unet"}
        value, *_ = jax.jit(task.loss)(params, frozen, batch | caption, jax.random.key(2), task.memory)
        losses.append(float(value))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# What a cache is named after ------------------------------------------------------------------------------------------


def folder_of(root: Path, n: int = 200) -> DataConfig:
    """`n` small images of their own colours, each with a caption."""
    root.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / f"{i:03}.png")
        (root / f"{i:03}.txt").write_text(f"image {i}")
    return DataConfig(source="folder", root=str(root), size=16, batch_size=4)


def test_every_caption_and_every_image_counts_for_the_identity_of_data_and_their_place_does_not(tmp_path):
    config = folder_of(tmp_path / "a")
    first = identity(open_source(config))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    moved = dataclasses.replace(config, root=str(tmp_path / "elsewhere" / "b"))
    assert identity(open_source(moved)) == first
    seen = {first}
    for i in range(0, 200, 7):
        caption, image = (tmp_path / "a" / f"{i:03}.{kind}" for kind in ("txt", "png"))
        before = caption.read_text(), image.read_bytes()
        caption.write_text("mended")
        seen.add(identity(open_source(config)))
        caption.write_text(before[0])
        Image.new("RGB", (4, 4), (i, 0, 1)).save(image)
        seen.add(identity(open_source(config)))
        image.write_bytes(before[1])
    assert len(seen) == 1 + 2 * len(range(0, 200, 7))
    assert identity(open_source(config)) == first


def test_processes_share_the_reading_of_an_identity(cached):
    for source in (open_source(CONFIG), LatentSource(cached)):
        whole = identity(source)
        parts = [identity(source, process_index=i, process_count=3) for i in range(3)]
        assert sum(parts) % 2**256 == whole
        assert identity(source, at_most=20) != whole == identity(source, at_most=10**6)


def cache_name(monkeypatch, tokenizer=None, settings=None, vae=None, **fields) -> str:
    """The folder that a run would cache in."""
    monkeypatch.setattr(encode_module, "cache_latents", lambda *args, **kwargs: 0)
    monkeypatch.setattr(encode_module, "text_encoder", lambda *args: encode_texts)
    config = runpy.run_path(str(Path(__file__).parent / "configs" / "tiny.py"))["config"]()
    task = dataclasses.replace(
        config.task, train_text_encoder=False, init="x", text_variants=1, text_encoder=tiny.TEXT_ENCODER
    )
    config = dataclasses.replace(config, task=dataclasses.replace(task, **settings or {}), **fields)
    rng = np.random.default_rng(0)
    weights = {name: tiny.random_params(name, sizes, rng) for name, sizes in
               (("vae", tiny.VAE), ("text_encoder", tiny.TEXT_ENCODER))}  # fmt: skip
    tokenizer = tokenizer or tiny.tokenizer()
    data, _ = encode_module.encode_once(
        config, vae or tiny.VAE, weights, (tokenizer,), open_source(CONFIG), "131 records", epath.Path("run")
    )
    return Path(data.root).name


def test_a_cache_is_named_after_all_that_its_content_depends_on(monkeypatch):
    name = cache_name(monkeypatch)
    others = {
        "dtype": cache_name(monkeypatch, dtype="bfloat16"),
        "tokenizer": cache_name(monkeypatch, tokenizer=Tokenizer.train(["other words"] * 9, 520, 24)),
        "its length": cache_name(monkeypatch, tokenizer=Tokenizer(tiny.tokenizer()._backend, 12)),
        "vae": cache_name(monkeypatch, vae=dataclasses.replace(tiny.VAE, norm_num_groups=2)),
        "vae of a younger field": cache_name(monkeypatch, vae=dataclasses.replace(tiny.VAE, use_quant_conv=False)),
        "seed": cache_name(monkeypatch, seed=1),
        "variants": cache_name(monkeypatch, settings={"latent_variants": 2}),
    }
    assert len({name, *others.values()}) == 1 + len(others)
    assert cache_name(monkeypatch, vae=dataclasses.replace(tiny.VAE, scaling_factor=0.25)) == name
    assert cache_name(monkeypatch, steps=9) == name
