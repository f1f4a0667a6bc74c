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
# The compiler's order of operations leaves room to run several at once, and lets more results wait for it: SD1.5's
# decoder takes 2.87 GB of temporaries so, and 0.91 GB in the order that wants the least memory, in the same time. Its
# UNet has small results, and would take 9 % more time.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def is_large(params: Any) -> bool:
    """Whether there are as many as `LARGE`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params)) >= LARGE


def is_narrow(params: Any) -> bool:
    """Whether any are stored in half width, so that a program that widens many at once takes twice their memory."""
    return any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(params))


@cache
def on_cpu(large: bool, least_memory: bool) -> dict[str, Any]:
    """What XLA is told for a network, where a CPU is the default device and XLA takes it: experiments end."""
    if jax.default_backend() != "cpu":
        return {}
    options = SMALL_ON_CPU if not large else LEAST_MEMORY if least_memory else {}
    if not options:
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Compiled:
    """`jax.jit(fn, **options)` for a function whose first argument is a network's params, compiled by their number.
    No device is asked for before the first call.

    Inside of other transformed functions it is a plain `jax.jit`, as JAX wants it there.
    """

    def __init__(self, fn: Callable[..., Any], least_memory: bool = False, **options: Any) -> None:
        """`least_memory` is for large networks whose results are large, too."""
        self._fn, self.least_memory, self._options, self._lowered = fn, least_memory, options, 0
        self._outer: dict[tuple[bool, bool], Any] = {}
        update_wrapper(self, fn)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn`'s results."""
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args)))
        return (self._inner if traced else self._for(params))(params, *args, **kwargs)

    def lower(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        self._lowered += 1
        return self._for(params).lower(params, *args, **kwargs)

    def trace(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        return self._for(params).trace(params, *args, **kwargs)

    @property
    def count(self) -> int:
        """How many programs calls and `lower` have made."""
        return sum(jitted._cache_size() for jitted in self._outer.values()) + self._lowered

    def _for(self, params: Any) -> Any:
        large = is_large(params)
        kind = large, large and (self.least_memory or is_narrow(params))
        if kind not in self._outer:
            self._outer[kind] = jax.jit(self._fn, compiler_options=on_cpu(*kind), **self._options)
        return self._outer[kind]

    @cached_property
    def _inner(self) -> Any:
        return jax.jit(self._fn, **self._options)
