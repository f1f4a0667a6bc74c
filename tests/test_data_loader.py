"""The loader: what a step holds depends on the seed and the step alone."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.loader import batches, open_source, sample_captions
from jaxdiff.data.tokens import Tokenizer

DATA = Path(__file__).parent / "data"
CONFIG = DataConfig(root=str(DATA), size=16, batch_size=8, flip=True, crop=0.8)


@pytest.fixture(scope="module")
def source():
    return open_source(CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["red apple on a background, style"] * 2, 560, max_length=24)


def take(n: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    read = batches(*args, **kwargs)
    taken = list(islice(read, n))
    read.close()
    return taken


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_has_the_promised_shapes(source, tokenizer):
    (batch,) = take(1, CONFIG, source, tokenizer, seed=0, start_step=3)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "image": ((8, 16, 16, 3), "float32"),
        "tokens": ((8, 24), "int32"),
        "index": ((8,), "int64"),
    }
    assert batch["index"].tolist() == list(range(24, 32))
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1


def test_a_resumed_run_reads_on_where_it_stopped(source, tokenizer):
    whole = take(20, CONFIG, source, tokenizer, seed=5)
    for start in (1, 7, 19):
        resumed = take(20 - start, CONFIG, source, tokenizer, seed=5, start_step=start)
        for a, b in zip(whole[start:], resumed, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("n", [2, 4])
def test_the_processes_batches_put_together_are_the_single_process_batch(source, tokenizer, n):
    whole = take(4, CONFIG, source, tokenizer, seed=1)
    parts = [take(4, CONFIG, source, tokenizer, seed=1, process_index=i, process_count=n) for i in range(n)]
    for step, batch in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        assert_equal(batch, joined)


def test_another_seed_is_another_order_and_other_draws(source, tokenizer):
    (a,), (b,) = (take(1, CONFIG, source, tokenizer, seed=seed) for seed in (0, 1))
    assert (a["image"] != b["image"]).any()


def test_every_epoch_shows_each_picture_once_in_an_order_of_its_own(tmp_path):
    # Pictures of one grey each, so that the picture tells its record.
    rows = []
    for i in range(12):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": "x"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    config = DataConfig(source="folder", root=str(tmp_path), size=4, batch_size=4)
    read = take(9, config, open_source(config), seed=0)
    greys = np.concatenate([((b["image"][:, 0, 0, 0] + 1) * 127.5).round().astype(int) for b in read]).reshape(3, 12)
    assert (np.sort(greys) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in greys.tolist()}) == 3


def test_a_batch_that_the_processes_cannot_share_is_refused(source):
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of the 3 processes"):
        batches(CONFIG, source, seed=0, process_count=3)


def folder_with_bad(root: Path, good: int, bad: int, max_bad_share: float) -> DataConfig:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(out, "JPEG")
    for i in range(good + bad):
        data = out.getvalue() if i < good else out.getvalue()[: len(out.getvalue()) // 2]
        (root / f"{i}.jpg").write_bytes(data)
        (root / f"{i}.txt").write_text("a dog")
    return DataConfig(source="folder", root=str(root), size=8, batch_size=10, max_bad_share=max_bad_share)


def test_bad_records_are_skipped_counted_and_named_and_others_take_their_places(tmp_path):
    config = folder_with_bad(tmp_path, good=18, bad=2, max_bad_share=0.1)
    read = batches(config, open_source(config), seed=0)
    for batch in islice(read, 6):
        assert batch["image"].shape == (10, 8, 8, 3)
    assert read.n_bad == 2
    assert set(read.bad) == {"18.jpg", "19.jpg"}
    assert all("truncated" in reason for reason in read.bad.values())
    read.close()
    for a, b in zip(
        take(4, config, open_source(config), seed=0), take(4, config, open_source(config), seed=0), strict=True
    ):
        assert_equal(a, b)


def test_too_many_bad_records_stop_the_run_with_their_names(tmp_path):
    config = folder_with_bad(tmp_path, good=17, bad=3, max_bad_share=0.1)
    with pytest.raises(ValueError, match=r"3 of 20 records cannot be used.*max_bad_share 0\.1 allows: 1[789]\.jpg"):
        take(20, config, open_source(config), seed=0)


def test_a_folder_of_nothing_but_bad_records_stops_at_once(tmp_path):
    config = folder_with_bad(tmp_path, good=0, bad=3, max_bad_share=0.5)
    said = (
        r"3 of 3 records .* share of 1, more than .*: .*0\.jpg \(.*truncated.*mend or remove them, or raise --data\.max"
    )
    with pytest.raises(ValueError, match=said):
        take(1, config, open_source(config), seed=0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_records_without_end_are_named_though_their_share_is_allowed(tmp_path, workers):
    rows = (json.dumps({"file_name": f"{i}.png", "text": "x"}) for i in range(1000))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    config = DataConfig(source="folder", root=str(tmp_path), size=8, batch_size=1, max_bad_share=0.9, workers=workers)
    with pytest.raises(
        ValueError, match=r"^100 records in a row cannot be used: .*No such file.* more; mend or remove them\.$"
    ):
        take(1, config, open_source(config), seed=0)


def bucketed(root: Path, bad: set[int], max_bad_share: float = 0.2, **fields) -> DataConfig:
    """Nine square images, and the tenth twice as wide, of greys that are their numbers; some are no images."""
    for i in range(10):
        Image.new("RGB", (32 if i == 9 else 16, 16), (i, i, i)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"(image {i}:1.5)")
        if i in bad:
            (root / f"{i}.png").write_bytes((root / f"{i}.png").read_bytes()[:45])
    shapes = {"size": 16, "side_multiple": 8, "aspects": ("1:1", "2:1")} | fields
    return DataConfig(source="folder", root=str(root), batch_size=2, max_bad_share=max_bad_share, **shapes)


def test_a_bad_record_alone_in_its_bucket_gives_its_steps_to_others(tmp_path):
    config = bucketed(tmp_path, set())
    (tmp_path / "9.txt").unlink()  # of a broken image the shape is not known, and so it would be in another bucket
    whole = take(25, config, open_source(config), seed=0)
    assert {batch["image"].shape for batch in whole} == {(2, 16, 16, 3)}
    parts = [take(25, config, open_source(config), seed=0, process_index=i, process_count=2) for i in range(2)]
    for step, batch in enumerate(whole):
        assert_equal(batch, {name: np.concatenate([part[step][name] for part in parts]) for name in batch})
    every = bucketed(tmp_path, set(range(10)), 0.99)
    with pytest.raises(ValueError, match=r"10 of 10 records cannot be used"):
        take(1, every, open_source(every), seed=0)


def test_a_grid_shows_captions_of_records_that_can_be_used(tmp_path):
    config = bucketed(tmp_path, set())
    for i in (0, 1, 9):
        (tmp_path / f"{i}.txt").write_text("")
    found = sample_captions(open_source(config), 4)
    assert found == [f"(image {i}:1.5)" for i in (2, 3, 6, 2)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "none.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"none\.png.*name prompts in DiffusionTask\.prompts"):
        sample_captions(open_source(config), 4)


@pytest.mark.parametrize(
    ("aspects", "size", "shape"),
    [
        ((), 48, (48, 48)),
        (("2:1", "1:1"), 100, (128, 128)),
        (("2:1", "1:4", "3:4"), 128, (128, 128)),
        (("3:1",), 64, (64, 128)),
    ],
)
def test_evaluations_have_a_shape_that_training_has(aspects, size, shape):
    config = DataConfig(size=size, aspects=aspects)
    assert config.of_one_shape().shapes == (shape,)
    assert shape in config.shapes


def test_images_without_captions_train_what_needs_none(tmp_path):
    config = bucketed(tmp_path, set(), aspects=())
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    source = open_source(config, captions=False)
    assert len(source) == 10
    (batch,) = take(1, config, source, seed=0)
    assert batch["image"].shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="10 images and no captions"):
        open_source(config)


WORKERS = """
import multiprocessing, sys, time
import numpy as np
from jaxdiff.config import DataConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.tokens import Tokenizer

if __name__ == "__main__":
    config = DataConfig(root=sys.argv[1], size=16, batch_size=8, flip=True, crop=0.8, workers=2)
    read = batches(config, open_source(config), Tokenizer.load(sys.argv[2], 24), seed=0, start_step=2)
    np.savez(sys.argv[3], **{f"{name}{step}": a for step in range(5) for name, a in next(read).items()})
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_worker_processes_read_the_same_and_die_with_a_killed_trainer(tmp_path, source, tokenizer):
    (tmp_path / "run.py").write_text(WORKERS)
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "run.py", str(DATA), "tokenizer", "batches.npz"]
    environment = os.environ | {"PYTHONPATH": str(DATA.parent.parent)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.send_signal(signal.SIGKILL)
    with np.load(tmp_path / "batches.npz") as read:
        for step, batch in enumerate(take(5, dataclasses.replace(CONFIG), source, tokenizer, seed=0, start_step=2)):
            assert_equal(batch, {name: read[f"{name}{step}"] for name in batch})
    assert len(workers) >= 2
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
