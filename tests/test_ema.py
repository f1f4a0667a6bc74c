"""Averages of the parameters against integrals and sums over toy trajectories."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import build
from jaxdiff.config import EMAConfig, TrainConfig, VAEConfig, VAETask, to_dict
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.folder import read_network, write_network
from jaxdiff.tools.ema import Args, main
from jaxdiff.training.ema import Snapshot, combine, exponent, posthoc, profiles

STEPS = 2000
THETA = np.cumsum(np.random.default_rng(0).normal(size=STEPS)) / 20 + np.sin(np.arange(STEPS) / 200)


def tracked(config: EMAConfig, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Each profile's average after every step of the trajectory, from another start."""

    def follow(decay):
        def step(average, now):
            t, theta = now
            share = decay(t)
            average = share * average + (1 - share) * theta
            return average, average

        return jax.lax.scan(step, jnp.float32(5.0), (jnp.arange(1, steps + 1), jnp.float32(THETA[:steps])))[1]

    return {name: np.asarray(jax.jit(lambda d=decay: follow(d))()) for name, decay in profiles(config).items()}


def weighed(width: float, steps: int) -> float:
    """The average by its definition, an integral of t^gamma theta(t) (Karras et al. 2024, section 3.1)."""
    edges = (np.arange(steps + 1) / steps) ** (exponent(width) + 1)
    return float(np.diff(edges) @ THETA[:steps])


def test_a_constant_average_is_young_first_and_then_forgets_by_its_decay():
    decay = profiles(EMAConfig(decay=0.99))["0.99"]
    assert float(decay(jnp.int32(1))) == pytest.approx(0.1)
    assert float(decay(jnp.int32(91))) == pytest.approx(0.91)
    assert float(decay(jnp.int32(10_000))) == pytest.approx(0.99)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.10, 0.25])
def test_a_power_profile_has_the_width_that_names_it(width):
    gamma = exponent(width)
    # Its density on [0, 1] is (gamma + 1) t^gamma, a beta distribution's.
    t = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * t**gamma / 200_000
    mean = (density * t).sum()
    assert np.sqrt((density * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)


def test_edm2s_widths_have_edm2s_exponents():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("width", [0.05, 0.10])
def test_a_tracked_power_average_is_the_one_that_its_definition_gives(width):
    averages = tracked(EMAConfig(profile="power", widths=(width,)))[f"{width:.3f}"]
    for step in (1, 10, 500, STEPS):
        assert float(averages[step - 1]) == pytest.approx(weighed(width, step), abs=2e-3)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.10, 0.15, 0.2])
def test_any_width_is_made_of_two_tracked_ones(width):
    tracks = tracked(EMAConfig(profile="power", widths=(0.05, 0.10)))
    snapshots = [Snapshot(step, float(name)) for step in range(100, STEPS + 1, 100) for name in tracks]
    shares = posthoc(snapshots, width, STEPS)
    made = sum(share * tracks[f"{s.width:.3f}"][s.step - 1] for s, share in zip(snapshots, shares, strict=True))
    assert shares.sum() == pytest.approx(1)
    spread = THETA.std()
    assert made == pytest.approx(weighed(width, STEPS), abs=(0.02 if width >= 0.05 else 0.06) * spread)


def test_a_width_that_was_tracked_comes_back_as_it_is():
    snapshots = [Snapshot(step, width) for step in (500, 1000) for width in (0.05, 0.10)]
    np.testing.assert_allclose(posthoc(snapshots, 0.10, 1000), [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(posthoc(snapshots, 0.05, 500), [1, 0, 0, 0], atol=1e-6)


def test_trees_are_combined_leaf_by_leaf_in_float32():
    trees = [{"a": np.full(2, value, np.float32), "b": {"c": np.float32(value)}} for value in (1, 2, 4)]
    found = combine(iter(trees), np.array([1.0, -0.5, 0.25]))
    np.testing.assert_allclose(found["a"], 1)
    assert found["a"].dtype == np.float32


def test_widths_that_cannot_be_named_are_refused():
    with pytest.raises(ValueError, match="they must rise, and differ in their first three digits"):
        EMAConfig(widths=(0.10, 0.05))
    with pytest.raises(ValueError, match=r"each must lie between 0 and 0\.28"):
        EMAConfig(widths=(0.5,))


@pytest.mark.slow
def test_the_tool_makes_a_width_out_of_a_runs_checkpoints(tmp_path):
    task = VAETask(
        vae=VAEConfig(
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
        )
    )
    widths = (0.05, 0.10)
    config = TrainConfig(workdir=str(tmp_path), task=task, ema=EMAConfig(profile="power", widths=widths))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    shapes = build.param_shapes(build.vae(task.vae), task.vae)
    tracks = tracked(config.ema)

    def like(value):
        return jax.tree.map(lambda s: jnp.full(s.shape, value, jnp.float32), shapes)

    steps = range(400, STEPS + 1, 400)
    with Checkpoints(tmp_path / "checkpoints", keep=10) as checkpoints:
        for step in steps:
            ema = {name: like(track[step - 1]) for name, track in tracks.items()}
            checkpoints.save(step, {"step": jnp.int32(step), "params": like(0.0), "ema": ema})
    write_network(tmp_path / "export", "vae", task.vae, jax.device_get(like(9.0)))

    for out in (tmp_path / "export", tmp_path / "made" / ".." / "export" / "vae"):
        with pytest.raises(ValueError, match="is what the run exports"):
            main(Args(tmp_path, width=0.07, out=out))
    for step in (-1, STEPS + 1):
        with pytest.raises(ValueError, match=rf"--step {step}: it must be from 1 to {STEPS}"):
            main(Args(tmp_path, width=0.07, out=tmp_path / "made", step=step))
    main(Args(tmp_path, width=0.07, out=tmp_path / "made"))
    _, params = read_network(tmp_path / "made", "vae")
    snapshots = [Snapshot(step, width) for step in steps for width in widths]
    shares = posthoc(snapshots, 0.07, STEPS)
    expected = sum(share * tracks[f"{s.width:.3f}"][s.step - 1] for s, share in zip(snapshots, shares, strict=True))
    for leaf in jax.tree.leaves(params):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)

    (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(config, ema=EMAConfig()))))
    with pytest.raises(ValueError, match=r"tracked no power profiles; train with --ema\.profile power"):
        main(Args(tmp_path, width=0.07, out=tmp_path / "made"))
