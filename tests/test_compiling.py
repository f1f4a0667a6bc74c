"""What XLA is told beside its defaults."""

import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.runtime import compile as compiling
from jaxdiff.runtime.compile import Compiled


def layer(params, x, power):
    """A product, which XLA's CPU compiler else hands to a library."""
    return (x @ params["w"]) ** power


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the CPU's compiler")
def test_small_networks_multiply_by_xlas_own_products_on_cpus_and_large_ones_by_a_librarys(monkeypatch):
    params, x = {"w": jnp.eye(300)}, jnp.asarray(np.random.default_rng(0).normal(size=(200, 300)), jnp.float32)
    fn = Compiled(layer, static_argnames="power")
    if "ynn" not in jax.jit(layer, static_argnames="power").lower(params, x, power=2).compile().as_text():
        pytest.skip("this version of XLA has no such library")
    assert "ynn" not in fn.lower(params, x, power=2).compile().as_text()
    small = fn(params, x, power=2)
    monkeypatch.setattr(compiling, "LARGE", 90_000)
    assert "ynn" in fn.trace(params, x, power=2).lower().compile().as_text()
    np.testing.assert_allclose(fn(params, x, power=2), small, rtol=1e-6)
    assert fn.count == 3, "a call of each, and one lowered"


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "SMALL_ON_CPU", {"xla_cpu_an_experiment_that_ended": ""})
    assert inspect.unwrap(compiling.on_cpu)(False, False) == {}


def test_no_device_is_asked_for_before_the_first_call():
    code = "import jax, jaxdiff.generation.programs; jax.config.update('jax_num_cpu_devices', 3); print(jax.devices())"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert run.stdout.count("id=") == 3
