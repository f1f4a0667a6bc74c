"""Buckets: each step has one shape, every picture comes once an epoch, and any step can be read directly."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.buckets import Schedule, nearest_shapes
from jaxdiff.data.loader import batches, open_source

ASPECTS = ("1:1", "2:1", "1:2")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """38 pictures: 21 square, 12 wide, 5 high; each of one colour, which tells its number."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(38):
        size = (20, 20) if i < 21 else (30, 16) if i < 33 else (16, 40)
        Image.new("RGB", size, (i, 0, 0)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"picture {i}")
    return DataConfig(source="folder", root=str(root), size=16, batch_size=4, aspects=ASPECTS, side_multiple=4)


def take(n: int, config: DataConfig, start: int = 0, process: int = 0, processes: int = 1) -> list[dict]:
    read = batches(config, open_source(config), seed=7, start_step=start, process_index=process,
                   process_count=processes)  # fmt: skip
    taken = list(islice(read, n))
    read.close()
    return taken


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    return ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().astype(int).tolist()


def test_the_shapes_have_the_aspects_and_the_area_asked_for():
    config = DataConfig(size=512, aspects=("1:1", "4:3", "3:4", "16:9", "9:16", "2.39:1"))
    assert config.shapes == ((512, 512), (448, 576), (576, 448), (384, 704), (704, 384), (320, 768))
    assert DataConfig(size=48).shapes == ((48, 48),)
    for height, width in config.shapes:
        assert 0.85 < height * width / 512**2 < 1.1


@pytest.mark.parametrize(
    ("aspects", "said"),
    [
        (("1:1", "4x3"), "'4x3'; it must be width:height"),
        (("1:0",), "'1:0'"),
        (("100:1",), "more than 16 times"),
        (("1:1", "1:1"), "one aspect twice"),
        (("1:1", "21:20"), "'1:1' and '21:20' are both 64x64 pixels at size 64 and side_multiple 64"),
    ],
)
def test_aspects_that_make_no_sense_are_refused(aspects, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(aspects=aspects)


def test_a_picture_belongs_to_the_nearest_ratio():
    sizes = np.array([[100, 100], [141, 100], [142, 100], [100, 142], [1000, 10], [0, 0]])
    assert nearest_shapes(sizes, [(16, 16), (8, 16), (16, 8)]).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("counts", [[21, 12, 5], [3, 1, 1, 1], [200, 0, 1], [7]])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_bucket_has_its_batches_in_a_row_and_its_share_of_every_epoch(counts, batch_size):
    schedule = Schedule(counts, batch_size, seed=0)
    total = sum(counts)
    seen = [0] * len(counts)
    for step in range(1, 12 * total // batch_size):
        bucket, number = schedule(step - 1)
        assert number == seen[bucket]
        seen[bucket] += 1
        # At the end of epoch e, each bucket has shown e times its pictures, but for a batch not yet full.
        epoch = schedule._epoch(step)
        if schedule._first_step(epoch) == step:
            assert [n * batch_size for n in seen] == [epoch * n // batch_size * batch_size for n in counts]
    fresh = Schedule(counts, batch_size, seed=0)
    assert [fresh(step) for step in (77, 5)] == [schedule(77), schedule(5)]
    assert schedule(10**9)[0] in range(len(counts))


def test_no_picture_is_lost_or_repeated_in_an_epoch_of_its_bucket(config):
    read = take(19 * 6, config)  # two times 38 pictures are 19 batches
    for members in (range(21), range(21, 33), range(33, 38)):
        stream = [n for batch in read for n in numbers(batch) if n in members]
        epochs = [stream[i : i + len(members)] for i in range(0, len(stream) - len(members) + 1, len(members))]
        assert len(epochs) >= 8
        assert all(sorted(epoch) == list(members) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_each_batch_has_one_of_the_shapes_and_the_pictures_of_it(config):
    assert config.shapes == ((16, 16), (12, 24), (24, 12))
    shapes = set()
    for batch in take(40, config):
        shape = batch["image"].shape[1:3]
        members = {(16, 16): range(21), (12, 24): range(21, 33), (24, 12): range(33, 38)}[shape]
        assert set(numbers(batch)) <= set(members)
        shapes.add(shape)
    assert shapes == set(config.shapes)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_after_a_resume_at_any_step_the_processes_read_slices_of_the_same_batches(config, n):
    whole = take(12, config)
    for start in (0, 1, 5, 11):
        parts = [take(12 - start, config, start, i, n) for i in range(n)]
        for step, batch in enumerate(whole[start:]):
            for name in batch:
                np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), batch[name])


def test_pictures_turned_by_their_exif_data_are_measured_as_they_are_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    assert open_source(DataConfig(source="folder", root=str(tmp_path))).sizes().tolist() == [[10, 30], [0, 0]]


def test_a_bad_picture_is_replaced_by_one_of_its_shape(tmp_path):
    for i in range(8):
        Image.new("RGB", (32, 16) if i % 2 else (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    data = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(data[:40])  # its head is whole
    bad = DataConfig(source="folder", root=str(tmp_path), size=16, batch_size=4, aspects=ASPECTS, side_multiple=8,
                     max_bad_share=0.2)  # fmt: skip
    for batch in take(10, bad):
        wide = batch["image"].shape[2] > 16
        assert all(n % 2 == wide and n != 3 for n in numbers(batch))


def test_batches_tell_of_which_picture_each_row_is_which_part(config):
    """30x16 pixels lose no column in 24x12, and 16x40 lose 3 of 30 rows at each end in 12x24."""
    sizes = {0: (20, 20, 0, 0, 16, 16), 21: (16, 30, 0, 0, 12, 24), 33: (40, 16, 3, 0, 24, 12)}
    with closing(batches(config, open_source(config), seed=7, numbers=True)) as read:
        for batch in islice(read, 12):
            pictures = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().astype(int)
            wanted = [sizes[max(first for first in sizes if first <= picture)] for picture in pictures]
            np.testing.assert_array_equal(batch["numbers"], wanted)
            assert batch["image"].shape[1:3] == wanted[0][4:]
