"""What XLA is told when it compiles, beside its defaults."""

from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import jax
import jax.core

# XLA's CPU compiler (that of jax 0.10 to 0.12) hands matrix products and sums to a library, YNNPACK. Its products are
# faster where they are large: SD1.5's UNet takes 4.2 s, and 4.7 s without. Where they are small, XLA's own are: the
# embedded model draws in 0.45 s in place of 0.56. A UNet of 37 M parameters gains 2 %, its training step loses 4 %, and
# so training is left alone.
LARGE = 50_000_000
"""A network of so many parameters, or more, has large products."""
SMALL_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}  # sums alone


def is_large(params: Any) -> bool:
    """Whether there are as many as `LARGE`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params)) >= LARGE


@cache
def for_small() -> dict[str, str]:
    """`SMALL_ON_CPU` where that is the default device, and XLA takes it: experiments end."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=SMALL_ON_CPU).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return SMALL_ON_CPU


class Compiled:
    """`jax.jit(fn, **options)` for a function whose first argument is a network's params, compiled by their number.
    No device is asked for before the first call.

    Inside of other transformed functions it is a plain `jax.jit`, as JAX wants it there.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self._fn, self._options = fn, options
        update_wrapper(self, fn)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn`'s results."""
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args)))
        return (self._large if traced else self._for(params))(params, *args, **kwargs)

    def lower(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        return self._for(params).lower(params, *args, **kwargs)

    def trace(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        return self._for(params).trace(params, *args, **kwargs)

    @property
    def count(self) -> int:
        """How many programs calls have made."""
        return self._large._cache_size() + self._small._cache_size()

    def _for(self, params: Any) -> Any:
        return self._large if is_large(params) else self._small

    @cached_property
    def _large(self) -> Any:
        return jax.jit(self._fn, **self._options)

    @cached_property
    def _small(self) -> Any:
        return jax.jit(self._fn, compiler_options=for_small(), **self._options)
