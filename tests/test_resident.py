"""Data that lie on the devices give the batches that reading gives, and calls of many steps are the same steps."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.latents import cache_latents
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.record import BadRecord, Record
from jaxdiff.data.resident import Resident
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.training.course import lengths
from jaxdiff.training.feed import to_devices
from jaxdiff.training.optim import learning_rate
from jaxdiff.training.resident import RESIDENT, looked_up, place_resident

PICTURES = DataConfig(root=str(Path(__file__).parent / "data"), size=16, batch_size=8, flip=True)


def tokenize(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), sum(text.encode())] for text in texts], np.int32)


def moments_of(images: np.ndarray) -> np.ndarray:
    return np.repeat(images.reshape(len(images), 4, 4, 4, 4, 3).mean((2, 4)), 2, axis=-1)


def contexts_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    tokens = tokenize(texts).astype(np.float32) / 100
    return tokens[:, :, None], tokens


@pytest.fixture(scope="module", params=["drawings", "resized", "latents", "contexts"])
def data(request, tmp_path_factory):
    """A config and its source."""
    if request.param in ("drawings", "resized"):
        config = dataclasses.replace(PICTURES, size=16 if request.param == "drawings" else 24)
        return config, open_source(config)
    folder = tmp_path_factory.mktemp("latents")
    texts = {"text_fn": contexts_of, "text_variants": 3} if request.param == "contexts" else {}
    cache_latents(moments_of, PICTURES, open_source(PICTURES), folder, variants=2, seed=0, **texts)
    config = DataConfig(source="latents", root=str(folder), size=16, batch_size=8)
    return config, open_source(config)


@pytest.mark.parametrize(("devices", "numbers"), [(1, False), (8, True)])
def test_rows_that_are_looked_up_are_the_batch_that_is_read(data, devices, numbers):
    config, source = data
    mesh = make_mesh(devices=jax.devices()[:devices])
    resident = Resident(source, config, numbers)
    arrays = place_resident(resident.take_arrays(), mesh)
    look_up = jax.jit(lambda batch: looked_up(batch, mesh))
    read, rows = (
        batches(config, some, tokenize, tokenize, seed=3, start_step=5, numbers=numbers) for some in (source, resident)
    )
    for wanted, found in itertools.islice(zip(read, rows, strict=True), 12):
        found = look_up(to_devices(found, mesh) | {RESIDENT: arrays})
        assert found.keys() == wanted.keys()
        assert ("numbers" in found) == numbers
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
            assert devices == 1 or len(found[name].sharding.device_set) == devices
    read.close()
    rows.close()


class Damaged:
    """Every third record cannot be read."""

    def __init__(self) -> None:
        self.source = open_source(PICTURES)

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        if index % 3 == 0:
            raise BadRecord("torn")
        return self.source.record(index)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def sizes(self) -> np.ndarray:
        return self.source.sizes()


def test_records_that_cannot_be_read_are_replaced_by_the_same_others_and_told():
    config, mesh = dataclasses.replace(PICTURES, max_bad_share=0.5), make_mesh(devices=jax.devices()[:1])
    resident = Resident(Damaged(), config)
    arrays = place_resident(resident.take_arrays(), mesh)
    read, rows = (batches(config, some, tokenize, seed=3) for some in (Damaged(), resident))
    for wanted, found in itertools.islice(zip(read, rows, strict=True), 6):
        np.testing.assert_array_equal(
            looked_up(to_devices(found, mesh) | {RESIDENT: arrays}, mesh)["image"], wanted["image"]
        )
        np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    assert rows.bad == read.bad
    assert rows.bad
    read.close()
    rows.close()


@pytest.mark.parametrize("change", [{"crop": 0.8}, {"aspects": ("1:1", "4:3"), "side_multiple": 8, "size": 64}])
def test_what_is_no_row_of_an_array_is_refused(change):
    config = dataclasses.replace(PICTURES, **change)
    with pytest.raises(ValueError, match=r"resident.*(crop|aspects)"):
        Resident(open_source(config), config)


def run_config(**fields) -> TrainConfig:
    return TrainConfig(workdir="run", task=DiffusionTask(), model="model", **fields)


@pytest.mark.parametrize("start", [0, 7, 40])
def test_calls_end_where_something_is_done_and_with_the_run(start):
    config = run_config(steps=103, steps_per_call=16, log_every=10, eval_every=25, checkpoint_every=50)
    ends = [start, *itertools.accumulate(lengths(config, start), initial=start)][1:]
    assert ends[-1] == 103
    for n in (10, 25, 50):
        assert {step for step in range(start + 1, 104) if step % n == 0} <= set(ends)
    assert max(np.diff(ends)) <= 16
    assert list(lengths(dataclasses.replace(config, steps_per_call=1), 100)) == [1, 1, 1]


def test_by_the_clock_there_is_no_last_step_and_rates_follow_the_time():
    config = run_config(seconds=60.0, steps=5, steps_per_call=4, log_every=8)
    assert list(itertools.islice(lengths(config, 0), 4)) == [4, 4, 4, 4]
    optim = dataclasses.replace(config.optim, lr=1.0, warmup_steps=9)
    rate = learning_rate(optim, config.steps)
    assert float(rate(4, 0.0)) == pytest.approx(0.5)  # the warm-up takes its steps
    half, end = float(rate(jnp.int32(100), jnp.float32(0.5))), float(rate(7, 1.0))
    assert (half, end) == pytest.approx((0.5, 0.0), abs=1e-6)  # half a cosine
    constant = learning_rate(dataclasses.replace(optim, schedule="constant"), 5)
    assert float(constant(100, 0.99)) == 1


def test_a_long_call_of_batches_of_several_shapes_is_refused():
    data = DataConfig(aspects=("1:1", "4:3"), side_multiple=8)
    with pytest.raises(ValueError, match=r"steps_per_call.*aspects"):
        run_config(steps_per_call=4, data=data)


def test_captions_stay_with_their_records():
    resident = Resident(open_source(PICTURES), PICTURES)
    assert isinstance(resident.record(3).caption, Caption)
    assert resident.record(3).caption == open_source(PICTURES).record(3).caption
    assert len(resident) == len(open_source(PICTURES))
