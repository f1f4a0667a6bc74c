"""The page's server: a real one on a free port, asked by the standard library as a browser would ask it."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from shell import ROOT, ended, free_port
from tiny import off

from jaxdiff.generation.programs import denoise
from jaxdiff.generation.request import Request
from jaxdiff.io.images import encode_image
from jaxdiff.tools.serve.__main__ import cli, listen
from jaxdiff.tools.serve.app import PAGE, make_app
from jaxdiff.tools.serve.requests import Limits
from jaxdiff.tools.serve.worker import Worker

LIMITS = Limits(body=100_000, pixels=32 * 32, images=8, steps=400, waiting=10, batch=4)


class Site:
    """A server that is asked."""

    def __init__(self, worker: Worker, port: int) -> None:
        self.worker, self.port = worker, port

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, bytes]:
        """The answer's status and body; headers are given as `content_type="..."`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def draw(self, headers: dict[str, str] | None = None, **asked: object) -> tuple[int, dict[str, list[dict]]]:
        """The status, and what is said by each kind of event; for a refusal, of "error"."""
        headers = {"content_type": "application/json"} | (headers or {})
        status, body = self.ask("POST", "/api/draw", json.dumps(asked), **headers)
        if status != 200:
            return status, {"error": [json.loads(body)]}
        return status, told(body.decode())

    def draws(self, *asks: dict) -> list[dict[str, list[dict]]]:
        """Asks that wait in this order until all are there, and then are drawn."""
        answers: list[dict] = [{}] * len(asks)

        def ask(i: int) -> None:
            answers[i] = self.draw(**asks[i])[1]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asks))]
        counts = np.cumsum([one.get("n", 1) for one in asks])
        for thread, wanted in zip(threads, counts, strict=True):
            thread.start()
            until(lambda wanted=wanted: self.worker.waiting == wanted)
        self.worker.start()
        for thread in threads:
            thread.join(120)
        return answers


@contextlib.contextmanager
def asking(port: int, **asked: object) -> Iterator[socket.socket]:
    """A client that has asked for pictures, and goes at the end."""
    body = json.dumps(asked)
    head = (
        f"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(f"{head}\r\n\r\n{body}".encode())
        yield client


def heard(client: socket.socket, wanted: bytes) -> bytes:
    """What comes up to something wanted."""
    seen = b""
    while wanted not in seen:
        more = client.recv(65536)
        assert more, seen
        seen += more
    return seen


def told(text: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text):
        found.setdefault(name, []).append(json.loads(data))
    return found


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def picture(event: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["png"]))))


def file(image: np.ndarray) -> str:
    return base64.b64encode(encode_image(image)).decode()


@contextlib.contextmanager
def serving(worker: Worker, **options) -> Iterator[Site]:
    """A server in a thread; its worker does not draw yet."""
    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(make_app(worker, **options), ws="none", lifespan="off", log_level="warning",
                                timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            until(lambda: server.started)
            yield Site(worker, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture
def waiting(pipe):
    """A site whose worker draws when it is started."""
    with serving(Worker(pipe, LIMITS)) as site:
        yield site


@pytest.fixture(scope="module")
def site(pipe):
    """A site that draws."""
    with serving(Worker(pipe, LIMITS), names=["friendly.lan"]) as site:
        site.worker.start()
        yield site


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)


def test_the_page_comes_whole_and_asks_nobody_else(site):
    status, page = site.ask("GET", "/")
    assert status == 200
    assert b"<title>jaxdiff</title>" in page
    assert set(re.findall(rb"https?://[^'\"\s]+", page)) <= {b"http://www.w3.org/2000/svg"}, "a name, not an address"
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request("GET", "/")
    headers = connection.getresponse().headers
    connection.close()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_is_told_what_it_can_turn_and_asks_for_fields_of_a_request(site):
    about = json.loads(site.ask("GET", "/api/info")[1])
    assert (about["size"], about["factor"]) == ([16, 16], 2)
    assert about["defaults"]["steps"] == 30
    assert about["samplers"]["lcm"] == ["model"]
    assert about["limits"]["waiting"] == 10
    page = PAGE.read_text()
    asked = page[page.index("const NAMES") : page.index("function recall")]
    names = {*re.findall(r"(\w+): ", asked), *re.findall(r"ask\.(\w+) =", asked), *re.findall(r'"(\w+)"[,\]]', asked)}
    fields = {*Request().values(), "preview"}
    assert {"prompt", "steps", "schedule", "apg_eta", "image", "mask"} < names <= fields


def test_a_picture_is_the_pipelines_own_and_its_file_says_how_it_was_made(site, pipe):
    settings = {"negative_prompt": "blue", "seed": 5, "steps": 4, "guidance": 3.0, "sampler": "euler",
                "schedule": "karras"}  # fmt: skip
    status, said = site.draw(prompt="a dog", **settings)
    assert status == 200
    (event,) = said["image"]
    np.testing.assert_array_equal(picture(event), pipe("a dog", **settings)[0])
    inside = json.loads(Image.open(io.BytesIO(base64.b64decode(event["png"]))).info["jaxdiff"])
    assert {"prompt": "a dog", "width": 16, "height": 16, "dtype": "float32", **settings}.items() <= inside.items()
    assert inside == event["settings"]
    assert said["done"] == [{}]
    assert [event["done"] for event in said["progress"]] == [1, 2, 3, 4]


def test_a_preview_is_the_models_guess_after_each_step_and_changes_no_pixel(site, pipe):
    guesses = []
    alone = pipe("a dog", steps=3, seed=2, on_step=lambda done, guess: guesses.append(pipe.preview(guess)[0]))[0]
    _, said = site.draw(prompt="a dog", steps=3, seed=2, preview=True)
    shown = [event["guesses"][0] for event in said["progress"] if "guesses" in event]
    assert len(shown) == 2, "the last is the image itself"
    for guess, data in zip(guesses, shown, strict=False):
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        assert seen.shape == (8, 8, 3), "a pixel for each of the latent's"
        assert np.abs(seen.astype(int) - guess).mean() < 16, "a JPEG of it"
    np.testing.assert_array_equal(picture(said["image"][0]), alone)


def test_kept_features_draw_the_same_picture_with_a_preview(site, pipe):
    _, said = site.draw(prompt="a dog", steps=6, cache_interval=3, preview=True)
    np.testing.assert_array_equal(picture(said["image"][0]), pipe("a dog", steps=6, cache_interval=3)[0])


def test_images_and_masks_do_what_the_pipeline_does_with_them(site, pipe, image):
    _, said = site.draw(prompt="a dog", steps=5, image=file(image), strength=0.5)
    np.testing.assert_array_equal(picture(said["image"][0]), pipe("a dog", steps=5, image=image, strength=0.5)[0])
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    _, said = site.draw(
        prompt="a dog",
        steps=5,
        image="data:image/png;base64," + file(image),
        mask=file(np.stack([mask] * 3, -1)),
        feather=2,
    )
    drawn = picture(said["image"][0])
    np.testing.assert_array_equal(drawn, pipe("a dog", steps=5, image=image, mask=mask, feather=2)[0])
    np.testing.assert_array_equal(drawn[:, :8], image[:, :8])
    assert off(drawn[:, 8:], image[:, 8:]) > 8
    assert len(said["image"][0]["settings"]["mask_sha256"]) == 64


def test_requests_that_wait_are_drawn_together_and_get_the_pictures_that_they_get_alone(waiting, pipe):
    asks = [
        {"prompt": "a dog", "seed": 3, "steps": 4},
        {"prompt": "blue", "seed": 3, "steps": 5},  # of other settings
        {"prompt": "a red apple", "seed": 7, "steps": 4, "negative_prompt": "blue"},
        {"prompt": "blue", "seed": 9, "steps": 4, "n": 3},
    ]
    answers = waiting.draws(*asks)
    together = [[(event["images"], event["together"]) for event in answer["started"]] for answer in answers]
    assert together == [[([0], 4)], [([0], 1)], [([0], 4)], [([0, 1], 4), ([2], 1)]]
    for ask, answer in zip(asks, answers, strict=True):
        assert [event["seed"] for event in answer["image"]] == [ask["seed"] + i for i in range(ask.get("n", 1))]
        for event in answer["image"]:
            alone = pipe(ask["prompt"], ask.get("negative_prompt"), seed=event["seed"], steps=ask["steps"])[0]
            assert off(picture(event), alone) <= 1, "batched convolutions round differently, and no more"


def test_three_pictures_are_drawn_by_the_program_for_four(waiting):
    waiting.draws({"prompt": "a dog", "steps": 2, "n": 4})
    before = denoise.count
    assert len(waiting.draw(prompt="a dog", steps=2, n=7)[1]["image"]) == 7
    assert denoise.count == before


def test_who_waits_hears_how_many_are_ahead(waiting):
    first, second, third = waiting.draws(
        {"prompt": "a", "steps": 2, "n": 5}, {"prompt": "b", "steps": 3}, {"prompt": "c", "steps": 4}
    )
    assert [event["ahead"] for event in first["queued"]] == [0]
    assert [event["ahead"] for event in second["queued"]] == [5, 1, 0]
    assert [event["ahead"] for event in third["queued"]] == [6, 2, 1, 0]


@pytest.mark.slow
def test_one_whose_picture_overflows_does_not_spoil_those_beside_it(waiting):
    # From a prompt to itself there is nothing to guide along, but for rounding.
    good = {"prompt": "a dog", "negative_prompt": "a dog", "steps": 3, "guidance": 1e37}
    answers = waiting.draws(good, {**good, "negative_prompt": ""}, good)
    assert [answer["started"][0]["together"] for answer in answers] == [3, 3, 3]
    assert "guidance 1e+37" in answers[1]["error"][0]["error"]
    for answer in (answers[0], answers[2]):
        assert len(answer["image"]) == 1


def test_what_only_the_pipeline_can_refuse_is_told_after_the_wait(site):
    status, said = site.draw(prompt="a dog", steps=2, guidance=1e30)
    assert (status, [name for name in said if name != "progress"]) == (200, ["queued", "started", "error"])
    assert "guidance 1e+30" in said["error"][0]["error"]


def test_a_full_queue_refuses_and_says_so(waiting):
    first = threading.Thread(target=lambda: waiting.draw(prompt="a dog", steps=2, n=8))
    first.start()
    until(lambda: waiting.worker.waiting == 8)
    status, said = waiting.draw(prompt="a dog", steps=2, n=3)
    assert status == 503
    assert re.search(r"\b8\b.*\b10\b", said["error"][0]["error"])
    waiting.worker.start()
    first.join(60)
    assert waiting.draw(prompt="a dog", steps=2, n=3)[0] == 200


def test_what_nobody_waits_for_is_not_drawn(waiting):
    with asking(waiting.port, prompt="a dog", steps=2, n=8):
        until(lambda: waiting.worker.waiting == 8)
    until(lambda: waiting.worker.waiting == 0)
    (answer,) = waiting.draws({"prompt": "blue", "steps": 3})
    assert len(answer["image"]) == 1


def test_a_drawing_ends_when_the_client_goes(waiting):
    with asking(waiting.port, prompt="a dog", steps=400, preview=True) as client:
        waiting.worker.start()
        seen = heard(client, b"event: progress")
    _, said = waiting.draw(prompt="a dog", steps=2)
    assert len(said["image"]) == 1
    last = [json.loads(data) for data in re.findall(rb"event: progress\ndata: (.*)\n", seen)]
    assert all(event["done"] < 400 for event in last)


def test_doubtful_prompts_are_drawn_with_a_warning_for_those_who_wrote_them(waiting):
    plain, doubtful = waiting.draws({"prompt": "a dog", "steps": 2}, {"prompt": "a (dog", "steps": 2})
    assert "warning" not in plain
    assert ["'('" in event["warning"] for event in doubtful["warning"]] == [True]
    assert doubtful["started"][0]["together"] == 2


@pytest.mark.parametrize(("asked", "status", "said"), [
    ({"prompt": "a" * 10_001}, 413, "prompt .*10001.*10000"),
    ({"steps": 401}, 413, "401.*400"),
    ({"steps": 100, "n": 5}, 413, "500.*400"),
    ({"n": 9}, 400, "n is 9.*1 to 8"),
    ({"preview": 1}, 400, "preview is 1"),
    ({"size": [64, 64]}, 413, "64x64.*1024"),
    ({"image": "!"}, 400, "image .*base64"),
    ({"image": 3}, 400, "image .*base64"),
    ({"image": "aGVsbG8="}, 400, "read"),
    ({"mask": "aGVsbG8="}, 400, "mask .*image"),
    ({"tile": 5}, 400, "tile is 5x5"),
    ({"clip_skip": 2}, 400, "clip_skip is 2"),
    # What a `Request` refuses, and what does not fit the model, for which there are more cases elsewhere:
    ({"step": 3}, 400, "'step'.*'steps'"),
    ({"seed": 2**32 - 1, "n": 2}, 400, "seed is 4294967295"),
    ({"size": [15, 16]}, 400, "15x16.*2"),
])  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(site, asked, status, said):
    got, answer = site.draw(**{"prompt": "a dog", "steps": 2} | asked)
    assert got == status
    assert re.search(said, answer["error"][0]["error"])


def test_bad_images_are_refused_before_they_are_decoded(site, image):
    bomb = file(np.zeros((40, 40, 3), np.uint8))
    broken = base64.b64encode(base64.b64decode(file(image))[:300]).decode()
    for status, said, asked in (
        (413, "image .*40x40.*1024", {"image": bomb}),
        (413, "mask .*40x40.*1024", {"image": file(image), "mask": bomb}),
        (413, "image .*48x48.*1024", {"image": file(image), "latent_upscale": 3}),
        (400, "read", {"image": broken}),
        (400, "mask .*16x8.*16x16", {"image": file(image), "mask": file(image[:8])}),
    ):
        got, answer = site.draw(prompt="a dog", steps=2, **asked)
        assert got == status
        assert re.search(said, answer["error"][0]["error"])


def test_requests_that_are_no_json_or_too_long_are_refused(site):
    def answer(body: bytes, content_type: str = "application/json") -> tuple[int, str]:
        status, answer = site.ask("POST", "/api/draw", body, content_type=content_type)
        return status, json.loads(answer)["error"]

    assert answer(b"{}", "text/plain")[0] == 415
    status, said = answer(b" " * 100_001)
    assert status == 413
    assert "100000" in said
    for body in (b"{", b"[" * 90_000, b"\xff", b"3"):
        status, said = answer(body)
        assert status == 400
        assert "JSON" in said
    # Without a length, the bytes themselves are counted.
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.request(
        "POST", "/api/draw", iter([b" " * 60_000] * 2), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_other_addresses_and_methods_are_sentences_too(site):
    assert site.ask("GET", "/no") == (404, b'{"error":"Not Found."}')
    assert site.ask("GET", "/api/draw")[0] == 405


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 400),  # it is listened to, and not understood
    ({"host": "localhost:99"}, 400),
    ({"host": "LOCALHOST"}, 400),
    ({"host": "[::1]:7860"}, 400),
    ({"host": "friendly.lan"}, 400),
    ({"host": "evil.example"}, 403),
    ({"host": "evil.example:7860"}, 403),
    ({"host": "localhost.evil.example"}, 403),
    ({"host": "192.168.0.7"}, 403),
    ({"host": ""}, 403),
    ({"host": "localhost", "origin": "http://localhost"}, 400),
    ({"host": "localhost", "origin": "https://localhost"}, 400),
    ({"host": "localhost", "origin": "http://localhost:3000"}, 403),
    ({"host": "localhost", "origin": "http://evil.example"}, 403),
    ({"host": "localhost", "origin": "null"}, 403),
    ({"host": "localhost", "sec_fetch_site": "cross-site"}, 403),
    ({"host": "localhost", "sec_fetch_site": "same-site"}, 403),
    ({"host": "localhost", "sec_fetch_site": "same-origin"}, 400),
])  # fmt: skip
def test_only_its_own_page_may_use_it(site, headers, status):
    assert site.ask("POST", "/api/draw", "{", content_type="application/json", **headers)[0] == status


def test_an_open_server_is_known_by_its_addresses_and_not_by_names(pipe):
    with serving(Worker(pipe, LIMITS), is_open=True) as site:
        assert site.ask("GET", "/", host="192.168.0.7:7860")[0] == 200
        assert site.ask("GET", "/", host="[fe80::1]")[0] == 200
        status, said = site.ask("GET", "/", host="evil.example")
        assert status == 403
        assert re.search("'evil.example'.*--names", json.loads(said)["error"])


def test_pictures_are_written_where_a_folder_is_given(pipe, tmp_path):
    with serving(Worker(pipe, LIMITS, tmp_path)) as site:
        site.draws({"prompt": "A red apple!", "seed": 3, "steps": 2, "n": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-red-apple-3.png", "a-red-apple-4.png"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["--port", "70000"], "--port is 70000.*65535"),
    (["--host", "no.such.host.invalid"], r"no\.such\.host\.invalid"),
    (["--host", "203.0.113.7"], r"203\.0\.113\.7"),
    (["--model", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_cannot_be_served_is_told_in_a_sentence(capsys, words, said):
    assert cli([*(["--port", "0"] if "--port" not in words else []), *words]) == 2
    assert re.match(f"error: .*{said}.*\n$", capsys.readouterr().err)


def test_limits_that_allow_nothing_are_told_by_name(capsys):
    with pytest.raises(SystemExit) as end:
        cli(["--limits.batch", "0"])
    assert end.value.code == 2
    assert "--limits.batch is 0" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_in_a_sentence(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli(["--port", str(port)]) == 2
    assert re.match(f"error: .*{port}.*--port", capsys.readouterr().err)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxdiff.tools.serve", "--model", str(folder), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, **pipes)


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_in_the_middle_of_a_picture(pipe, tmp_path):
    pipe.save(tmp_path / "tiny")
    port = free_port()
    process = start(tmp_path / "tiny", "--port", str(port), "--host", "0.0.0.0", "--limits.steps", "100000")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("warning: ")
        assert f"http://0.0.0.0:{port}" in process.stdout.readline()
        with asking(port, prompt="a dog", steps=900, n=8, preview=True) as client:
            heard(client, b"event: progress")
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            code, out = ended(process)
        assert time.monotonic() - began < 5
        assert (code, out) == (130, "")
    finally:
        process.kill()
