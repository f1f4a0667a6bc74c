"""What XLA is told when it compiles, beside its defaults."""

from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import jax

# XLA's CPU compiler (that of jax 0.10 to 0.12) hands sums, with what is round them, to a library, YNNPACK. Norms and
# softmax take longer there than in the loops that it writes else: a picture of the embedded model 0.68 s in place of
# 0.48. And reading a kept program looks through all of it for each of these calls.
CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


@cache
def compiler_options(platform: str) -> dict[str, str]:
    """For a jitted function that runs on "cpu", "gpu" or "tpu"; those that this version of XLA does not know are left
    out."""
    if platform != "cpu":
        return {}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda x: x, compiler_options=CPU).lower(0).compile()
    except jax.errors.JaxRuntimeError:  # experiments end
        return {}
    return CPU


class Compiled:
    """`jax.jit(fn, **options)` with `compiler_options` for the default device, which is not asked for before the first
    call. Inside of other jitted functions `inspect.unwrap` gives the function itself, as JAX wants it there."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self._fn, self._options = fn, options
        update_wrapper(self, fn)

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(self._fn, compiler_options=compiler_options(jax.default_backend()), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Of the function."""
        return self._jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Of the jitted function: `trace`, `lower` and so on."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted, name)
