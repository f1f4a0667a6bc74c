"""Latent diffusion in JAX: `pipe = jaxdiff.load(); images = pipe(["a red apple"])`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdiff.generation.pipeline import Pipeline, load

__all__ = ["Pipeline", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the pipeline when it is first asked for (PEP 562), so that `import jaxdiff` costs nothing."""
    if name in ("Pipeline", "load"):
        return getattr(import_module("jaxdiff.generation.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
