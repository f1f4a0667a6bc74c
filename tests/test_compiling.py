"""What XLA is told beside its defaults."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import compiling
from jaxdiff.compiling import Compiled, compiler_options


def centred(x, power):
    """With sums, which XLA's CPU compiler else hands to a library."""
    return (x @ x - (x @ x).mean(0)) ** power


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the CPU's compiler")
def test_on_cpus_sums_are_compiled_and_no_librarys():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)
    fn = Compiled(centred, static_argnames="power")
    if "ynn" not in jax.jit(centred, static_argnames="power").lower(x, power=2).compile().as_text():
        pytest.skip("this version of XLA has no such library")
    assert "ynn" not in fn.lower(x, power=2).compile().as_text()
    np.testing.assert_allclose(fn(x, power=2), centred(x, 2), rtol=1e-3, atol=1e-3)


def test_other_devices_are_told_nothing():
    assert compiler_options("gpu") == compiler_options("tpu") == {}


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "CPU", {"xla_cpu_an_experiment_that_ended": ""})
    assert inspect.unwrap(compiler_options)("cpu") == {}


def test_no_device_is_asked_for_before_the_first_call():
    code = "import jaxdiff.generate, jax; jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "JAX_PLATFORMS": "cpu"})
