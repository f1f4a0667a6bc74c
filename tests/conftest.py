"""Before any test: eight CPU devices, shape checks at every annotated call, and compiled programs kept between runs."""

import os
import pathlib
import tempfile

import pytest

DEVICES = "--xla_force_host_platform_device_count=8"
# XLA gives its CPU devices as many threads as there are devices. On a busy machine two collectives can then hold all of
# them and wait for each other, until XLA aborts pytest (`jaxdiff.runtime.distributed` has the same cure). XLA reads
# this once, when the first device is asked for; xdist's workers and the processes that tests start inherit it.
os.environ.setdefault("NPROC", "32")
# Tests compile far longer than they compute: LLVM's optimisations would double their time.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {DEVICES}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jaxdiff-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# No implicit promotion: what would turn out wider or broadcast by accident is an error, here and in the processes that
# tests start. Where optax and linen's layer norms rely on promotion of types, the package allows it round them alone.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

from jaxtyping import install_import_hook  # noqa: E402

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxdiff"
# All modules but those that take what users give, and say themselves what is wrong with it.
DOORS = {f"jaxdiff.generation.{name}" for name in ("request", "pipeline", "edits")}
CHECKED = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("[!_]*.py")]
install_import_hook([name for name in CHECKED if name not in DOORS], "beartype.beartype")


def pytest_configure(config):
    """Comparisons with other libraries have programs as users have them; so has any run that is given XLA_FLAGS."""
    if "parity" not in config.getoption("markexpr").replace("not parity", "") and not XLA_FLAGS:
        os.environ["XLA_FLAGS"] = f"{QUICKLY_COMPILED} {DEVICES}"


@pytest.fixture(scope="session")
def model():
    """A whole random model that is tiny; see `tiny`."""
    import tiny

    return tiny.model()


@pytest.fixture(scope="session")
def pipe(model):
    """The pipeline of `model`."""
    from jaxdiff.generation.pipeline import Pipeline

    return Pipeline(model)
