"""Programs kept between processes."""

import functools
import os
import platform
import resource
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.runtime import programs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder, as if this process had just begun."""
    monkeypatch.setattr(programs, "_folder", tmp_path / "traced")
    monkeypatch.setattr(programs, "_compiled", {})
    return tmp_path / "traced"


def traced_anew(calls: list, params, x, power: int):
    """What a new process does: (results, how often the function was traced)."""
    programs._compiled.clear()

    @functools.partial(jax.jit, static_argnames="power")
    def fn(params, x, *, power):
        calls.append(power)
        return x**power + params["a"], params["a"]

    return programs.kept(fn, params, x, power=power)(params, x)


def test_a_function_is_traced_once_for_all_processes_and_anew_for_other_shapes_and_settings(folder):
    calls, params, x = [], {"a": np.float32(1), "unused": np.zeros(5, np.float32)}, jnp.arange(4.0)
    for power, times in ((2, 1), (2, 1), (3, 2), (2, 2)):
        out, a = traced_anew(calls, params, x, power)
        np.testing.assert_allclose(out, x**power + 1)
        assert (float(a), len(calls)) == (1.0, times)
    traced_anew(calls, params, jnp.arange(5.0), 2)
    assert len(calls) == 3
    with jax.default_matmul_precision("highest"):
        traced_anew(calls, params, x, 2)
    assert len(calls) == 4, "JAX's configuration counts"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + b"?" + b[41:], lambda b: b""])
def test_a_damaged_trace_is_made_anew(folder, damage):
    calls, params, x = [], {"a": np.float32(1)}, jnp.arange(4.0)
    traced_anew(calls, params, x, 2)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    out, _ = traced_anew(calls, params, x, 2)
    np.testing.assert_allclose(out, x**2 + 1)
    assert len(calls) == 2


def test_what_is_told_apart_by_an_address_alone_is_not_kept(folder):
    programs.remembered("f", [lambda: None], lambda: b"x")
    assert not folder.exists()


def test_a_folder_keeps_the_last_traces_used(folder, monkeypatch):
    monkeypatch.setattr(programs, "MOST", 2)
    for i in range(4):
        programs.remembered("n", i, lambda: b"x")
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_other_users_write_in_is_not_used(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
    code = ("from jaxdiff.runtime import programs; import jax; programs.enable_compilation_cache(); "
            "print(jax.config.values['jax_compilation_cache_dir'], programs._folder)")  # fmt: skip
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for name, told in (("shared", "None None"), ("new", f"{tmp_path}/new {tmp_path}/new/traced")):
        place = tmp_path / name
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | {"JAXDIFF_CACHE": str(place)},
                             capture_output=True, text=True, check=True)  # fmt: skip
        assert run.stdout.strip() == told
        assert (str(place) in run.stderr) == (told == "None None")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_memory_that_is_free_between_what_is_kept_goes_back_to_the_system():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc alone holds it back")

    def resident() -> int:
        return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])

    pieces = [os.urandom(20_000) for _ in range(10_000)]
    pieces = pieces[::50]  # the others were between these
    before = resident()
    programs.give_back_memory()
    assert before - resident() > 100e6
    assert len(pieces) == 200
