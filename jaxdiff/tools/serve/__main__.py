"""The command line: `python -m jaxdiff.tools.serve`, then a browser at http://127.0.0.1:7860."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

import jaxdiff
from jaxdiff.generation.weights import Memory
from jaxdiff.model import FileOptions
from jaxdiff.runtime.cli import check_writable, exit_code
from jaxdiff.tools.serve.requests import Limits


@dataclass(frozen=True)
class Args:
    """Serves a page to try a model, on this machine alone unless --host says otherwise. Ctrl-C ends it."""

    model: Path | None = None
    """A diffusers folder, a run directory or a single file; without it, the model that comes with the package."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is all that this machine has."""
    port: int = 7860
    """The port to listen at; 0 takes a free one."""
    names: tuple[str, ...] = ()
    """Host names besides localhost that browsers may reach it by."""
    dtype: str | None = None
    """What the networks compute in: float32 (the default on CPUs) or bfloat16 (elsewhere)."""
    memory: Memory = "normal"
    """low keeps one network at a time, its kernels in 16 bits: less than half the memory, about 1.4 times the time;
    lowest keeps most of them in 8 bits."""
    preview: Path | None = None
    """The folder of a tiny autoencoder (TAESD), by which the guesses on the way are shown in the image's size."""
    out: Path | None = None
    """Write the images into this folder, too; without it nothing is written."""
    limits: Limits = field(default_factory=Limits)


def main(args: Args) -> None:
    """Listens, loads, and serves until it is ended."""
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("The page needs the serve extra: pip install 'jaxdiff[serve]'.") from error
    from jaxdiff.tools.serve.app import make_app
    from jaxdiff.tools.serve.worker import Worker

    class Server(uvicorn.Server):
        """Ends at once on Ctrl-C: both this server and Python would wait for what is being compiled or drawn."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """While it serves."""
            before = signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, before)

    with listen(args.host, args.port) as listener:  # before the model is read, which takes longer
        if args.out is not None:
            check_writable(args.out)
        worker = Worker(
            jaxdiff.load(args.model, args.dtype, memory=args.memory, preview=args.preview, **vars(args.file)),
            args.limits,
            args.out,
        )
        worker.start()
        host, port, *_ = listener.getsockname()
        is_open = not ipaddress.ip_address(host).is_loopback
        if is_open:
            print(f"warning: Whoever reaches port {port} of {host} can use this model, and this machine's time.",
                  file=sys.stderr)  # fmt: skip
        config = uvicorn.Config(
            make_app(worker, args.names, is_open), http="h11", ws="none", lifespan="off", log_level="warning",
            access_log=False, server_header=False, proxy_headers=False, limit_concurrency=256,
        )  # fmt: skip
        print(f"{worker.pipe.name} is at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        asyncio.run(Server(config).serve(sockets=[listener]))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: where there is no such address or port, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; it must lie from 0 to {2**16 - 1}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ValueError(f"Port {port} of {host} is taken; choose another by --port.") from error
        raise ValueError(f"{host}, port {port}, cannot be listened at: {error}.") from error
    return listener


def cli(argv: list[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    args = tyro.cli(Args, args=argv, prog="serve", description=__doc__)
    return exit_code(lambda: main(args))


if __name__ == "__main__":
    sys.exit(cli())
