"""Programs kept between processes: JAX's compiled ones, and beside them what they were traced to.

Tracing this package's networks takes longer than drawing a small image, and JAX's own cache begins after it. What is
kept is StableHLO and JSON, never a pickle; but like JAX's compiled programs it ends as code that runs, so a folder in
which other users may write is not used.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import inspect
import logging
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
from jax.core import ShapedArray

from jaxdiff.runtime.compile import Compiled
from jaxdiff.runtime.memory import temporaries

PACKAGE = Path(__file__).parents[1]
MOST = 64
"""So many traces are kept, the last ones used."""
# Kernels that later versions of JAX may not know; a trace is for one version and one kind of device.
KERNELS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
logger = logging.getLogger(__name__)
_folder: Path | None = None  # of the traces, once there is one


def enable_compilation_cache() -> None:
    """Keeps programs in the user's cache folder, so that the next process starts fast; `jaxdiff.load` calls this.

    The environment variable JAXDIFF_CACHE names another folder, or turns this off when it is "off", as it should be
    where functions of this package are replaced while it runs. Where JAX's own JAX_COMPILATION_CACHE_DIR is set, that
    stands, and JAX alone keeps its programs.
    """
    global _folder
    chosen = os.environ.get("JAXDIFF_CACHE", "")
    if chosen.lower() in ("off", "0", "no", "false") or jax.config.values["jax_compilation_cache_dir"]:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = chosen or str(base / "jaxdiff")
    if "://" not in place:
        with contextlib.suppress(OSError):  # JAX says that it cannot write there
            Path(place).mkdir(mode=0o700, parents=True, exist_ok=True)
            found = Path(place).stat()
            if found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
                logger.warning("Compiled programs are not kept: other users may write in %s; take that right from "
                               "them, or name another folder in JAXDIFF_CACHE.", place)  # fmt: skip
                return
            _folder = Path(place) / "traced"
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def give_back_memory() -> None:
    """Hands the system what compiling has left in this process: a gigabyte after a large program, on Linux."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc alone has it
    if trim is not None:
        trim(0)


def remembered(name: str, parts: Any, make: Callable[[], bytes]) -> bytes:
    """`make()`, or what it returned in an earlier process.

    Args:
        name: how the file's name begins.
        parts: whatever the result depends on beside this package's source, the versions of JAX and its configuration
            and the device; told apart by its `repr`.
        make: is called where nothing is kept.
    """
    told = repr(parts)
    if _folder is None or " at 0x" in told:  # a function's address says nothing in another process
        return make()
    path = _folder / f"{name}-{hashlib.sha256(f'{_surroundings()} {told}'.encode()).hexdigest()}"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[32:]).digest() == kept[:32]:
            path.touch()
            return kept[32:]
    made = make()
    with contextlib.suppress(OSError):  # a full disk or a folder without that right costs time, and nothing else
        _folder.mkdir(mode=0o700, exist_ok=True)
        half = path.with_name(f".{path.name}-{os.getpid()}")
        half.write_bytes(hashlib.sha256(made).digest() + made)
        half.replace(path)
        for old in sorted(_folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)
    return made


def kept(fn: Callable[..., Any], *args: Any, **static: Any) -> Callable[..., Any]:
    """`fn` with its static arguments, compiled from an earlier process's trace where there is one.

    Args:
        fn: a jitted function, whose arguments and results are arrays in containers that `jax.export` can serialise.
        args: what `fn` is to be called with, or arrays or `jax.ShapeDtypeStruct`s like it.
        static: `fn`'s static arguments.

    Returns:
        A function of `args`.
    """
    if _on_several_devices(args):
        return functools.partial(fn, **static)
    key = _key(fn, args, static)
    program = _compiled.get(key)
    if program is None:
        program = _lowered(fn, args, static, key).compile()
    elif isinstance(program, Future):
        program = program.result()
    else:
        return program
    logger.debug("%s compiled: %.2f GB of temporaries", fn.__name__, temporaries(program) / 1e9)
    _compiled[key] = program
    return program


def begin(fn: Callable[..., Any], *args: Any, **static: Any) -> None:
    """Has a thread compile what `kept` will be asked for with these arguments, while other work is done.

    It is traced before this returns, since Python does one thing at a time; the compiler does not wait for Python.
    """
    if not _on_several_devices(args) and (key := _key(fn, args, static)) not in _compiled:
        _compiled[key] = _thread().submit(_lowered(fn, args, static, key).compile)


_compiled: dict[Any, Any] = {}
"""Programs, and futures of programs."""


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "compile")


def _on_several_devices(args: Any) -> bool:
    return any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(args))


def _key(fn: Callable[..., Any], args: Any, static: dict[str, Any]) -> Any:
    leaves, tree = jax.tree.flatten(args)
    signature = tree, tuple(map(_aval, leaves)), tuple(static.items())
    settings = tuple(jax.config.values[name] for name in ("jax_default_device", "jax_default_matmul_precision"))
    return fn, signature, settings


def _aval(leaf: Any) -> Any:
    return ShapedArray(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)


def _lowered(fn: Callable[..., Any], args: Any, static: dict[str, Any], key: Any) -> Any:
    """What is left to compile, from an earlier process's trace where there is one."""
    if _folder is None:
        return fn.lower(*args, **static)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(kernel) for kernel in KERNELS]
    name = getattr(fn, "__name__", "program")

    def export() -> bytes:
        whole = jax.jit(lambda *args: inspect.unwrap(fn)(*args, **static), keep_unused=True)
        return bytes(jax.export.export(whole, disabled_checks=allowed)(*args).serialize())

    try:
        exported = jax.export.deserialize(bytearray(remembered(name, key[1], export)))
    except ValueError as error:
        if "custom call" not in str(error):
            raise
        logger.info("The trace of %s is not kept: %s", name, error)
        return fn.lower(*args, **static)

    def call(*args: Any) -> Any:
        return exported.call(*args)

    call.__name__ = name
    # The same for whatever layout the results of a call have.
    return Compiled(call, getattr(fn, "least_memory", False)).lower(*args)


def _surroundings() -> str:
    """What a trace depends on, whatever is traced."""
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    device = jax.devices()[0]
    return repr([_source(), device.platform, device.device_kind, sorted(settings.items(), key=str)])


@functools.cache
def _source() -> list[str]:
    """This package, and the versions of those it traces with."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return [digest.hexdigest(), *map(version, ("jax", "jaxlib", "flax", "numpy"))]
