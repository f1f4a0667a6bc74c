"""Before any test: eight CPU devices, shape checks at every annotated call, and compiled programs kept between runs."""

import os
import pathlib
import tempfile

DEVICES = "--xla_force_host_platform_device_count=8"
# Tests compile far longer than they compute: LLVM's optimisations would double the time of the short run.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {DEVICES}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jaxdiff-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jaxdiff", "beartype.beartype")


def pytest_configure(config):
    """Slow tests and comparisons have programs as users have them; so has any run that is given XLA_FLAGS."""
    if "not slow" in config.getoption("markexpr") and not XLA_FLAGS:
        os.environ["XLA_FLAGS"] = f"{QUICKLY_COMPILED} {DEVICES}"
