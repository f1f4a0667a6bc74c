"""The page and what it asks, over HTTP: a browser may talk to it from the page itself, and from nowhere else."""

import asyncio
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import jaxdiff
from jaxdiff.generation.request import Request
from jaxdiff.io.pages import content_policy
from jaxdiff.sampling.samplers import SAMPLERS, WITH_ETA
from jaxdiff.tools.serve.requests import Limits, Refused, read_request
from jaxdiff.tools.serve.worker import Job, Worker

PAGE = Path(__file__).parent / "page.html"
BODY_SECONDS = 60
"""A request that takes longer to arrive is given up."""
MAX_BEHIND = 8
"""To a client that reads slower than this many events, no more progress is told."""


def make_app(worker: Worker, names: Sequence[str] = (), is_open: bool = False) -> ASGIApp:
    """The whole application.

    Args:
        worker: draws.
        names: host names that browsers may know it by, beside localhost.
        is_open: whether it may be reached by addresses other than this machine's own.
    """
    page = PAGE.read_bytes()
    policy = f"{content_policy(page.decode(), 'data: blob:')}; connect-src 'self'; frame-ancestors 'none'"

    async def index(request: HTTPRequest) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def info(request: HTTPRequest) -> Response:
        return JSONResponse(await run_in_threadpool(describe, worker))

    async def draw(request: HTTPRequest) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "The request must be JSON: send Content-Type: application/json.")
        body = await _body(request, worker.limits)
        asked = await run_in_threadpool(read_request, body, worker.pipe, worker.limits)
        events = Events()
        job = Job(asked, events.tell)
        for warning in asked.warnings:
            events.tell("warning", {"warning": warning})
        worker.submit(job)
        return Stream(job, events)

    routes = [Route("/", index), Route("/api/info", info), Route("/api/draw", draw, methods=["POST"])]
    handlers = {kind: _refusal for kind in (Refused, ValueError, HTTPException, ClientDisconnect)}
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), names, is_open)


def describe(worker: Worker) -> dict[str, Any]:
    """What the page needs to know to lay itself out."""
    pipe = worker.pipe
    return {
        "model": pipe.name,
        "dtype": pipe.dtype,
        "version": f"jaxdiff {jaxdiff.__version__}",
        "size": pipe.size,
        "factor": pipe.networks.factor,
        "defaults": Request().values() | pipe.defaults,
        "samplers": {name: list(sampler.schedules) for name, sampler in SAMPLERS.items()},
        "with_eta": list(WITH_ETA),
        "limits": asdict(worker.limits),
    }


class Events:
    """What is told to a client, in order; from any thread into an event loop's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    def tell(self, name: str, said: dict[str, Any]) -> None:
        """Says it; progress, only to who keeps up."""
        if name != "progress" or self._queue.qsize() < MAX_BEHIND:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (name, said))

    async def __aiter__(self) -> AsyncIterator[str]:
        """Server-Sent Events, up to the one that is the last."""
        name = ""
        while name not in ("done", "error"):
            name, said = await self._queue.get()
            yield f"event: {name}\ndata: {json.dumps(said)}\n\n"


class Stream(StreamingResponse):
    """A job's events. When the client goes, nobody waits for the job."""

    def __init__(self, job: Job, events: Events) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.ended = True


async def _body(request: HTTPRequest, limits: Limits) -> bytes:
    """The request's bytes, as long as they are not too many."""
    too_large = Refused(413, f"The request has more than {limits.body} bytes, which are the most.")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > limits.body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                if (size := size + len(part)) > limits.body:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"The request took more than {BODY_SECONDS} seconds to arrive.") from None
    return b"".join(parts)


async def _refusal(request: HTTPRequest, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else getattr(error, "status_code", 400)
    sentence = f"{error.detail}." if isinstance(error, HTTPException) else str(error)
    headers = {"Retry-After": "10"} if status == 503 else None
    return JSONResponse({"error": sentence}, status, headers)


# Who may talk to it ---------------------------------------------------------------------------------------------------


def _guarded(app: ASGIApp, names: Sequence[str], is_open: bool) -> ASGIApp:
    """The application for requests to a host that it is known by, from its own page or from no page at all.

    A page elsewhere can make a browser send requests here. If it reaches here by a name of its own (DNS rebinding), the
    Host header has that name; else the Origin header says where the page is from.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        refused = None
        if not _is_known(host, names, is_open):
            refused = f"This server is not known as {host!r}; use its address, or start it with --names."
        elif origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            refused = f"Pages from {origin!r} may not use this server."
        elif scope["method"] != "GET" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            refused = "Pages from elsewhere may not use this server."
        answer = app if refused is None else JSONResponse({"error": refused}, 403)
        await answer(scope, receive, partial(_send, send))

    return guarded


HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def _send(send: Send, message: Any) -> None:
    if message["type"] == "http.response.start":
        given = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        message = {**message, "headers": [*message["headers"], *given]}
    await send(message)


def _is_known(host: str, names: Sequence[str], is_open: bool) -> bool:
    """Whether a Host header is one of ours: no page elsewhere can have an address, or localhost, for its name."""
    name = re.sub(r":\d*$", "", host).lower()
    if name in ("localhost", *(known.lower() for known in names)):
        return True
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return is_open or address.is_loopback
