"""A study's page in a real browser, from a folder and from a server: judged by keys and clicks, stopped and gone on."""

import functools
import http.server
import json
import random
import re
import threading
from pathlib import Path

import pytest

pytest.importorskip("selenium.webdriver", reason="needs the browser extra")

from chromium import MISSING, Window, chromium
from selenium.webdriver import ActionChains, Keys
from test_judge import PROMPTS, draw, manifest_of

from jaxdiff.tools.judge.__main__ import cli
from jaxdiff.tools.judge.answers import Rater, read_answers, read_key

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
KEYS = {"left": [Keys.ARROW_LEFT, "1"], "right": [Keys.ARROW_RIGHT, "2"], "tie": [Keys.ARROW_DOWN, "0"]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two models, five prompts, one image each: 5 pairs, a check, and two of them again."""
    root = tmp_path_factory.mktemp("study")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    for model, name in enumerate(("one", "two")):
        draw(root / name, root / "prompts.txt", model, n=1, size=8)
    words = [root / "one", root / "two", "--prompts", root / "prompts.txt", "--out", root / "out", "--repeat-every", 4]
    assert cli(["make", *map(str, words)]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def served(study):
    """The page's address at a server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=study / "page")
    handler.log_message = lambda *_: None  # pyright: ignore
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as driver:
        yield driver


class Page(Window):
    """What a rater sees and does."""

    def begin(self, name: str) -> None:
        self.one("#name").clear()
        self.one("#name").send_keys(name)
        self.one("#begin").click()
        self.until(self.ready)

    def ready(self) -> bool:
        return self.one("#end").is_displayed() or self.one("[data-choice=tie]").is_enabled()

    def press(self, key: str) -> None:
        ActionChains(self.browser).send_keys(key).perform()

    def images(self) -> tuple[str, ...]:
        """The names of the left and the right image."""
        return tuple(self.one(f"#{side}").get_attribute("src").rpartition("/")[2] for side in ("left", "right"))

    def question(self) -> str:
        return self.one("#question").text

    def judge(self, fits: str, drawn: str) -> tuple[str, str, str, str]:
        """Answers both questions: by clicks on images and buttons, and by keys, as chance will."""
        seen = self.images()
        for number, choice in enumerate((fits, drawn), 1):
            assert self.question().startswith(f"{number} of 2")
            ways = [*KEYS[choice], *self.all(f"[data-choice={choice}]")]
            way = random.choice(ways)
            self.press(way) if isinstance(way, str) else way.click()
        self.until(self.ready)
        return (*seen, fits, drawn)

    def download(self, folder: Path) -> Path:
        before = set(folder.iterdir())
        next(one for one in self.all(".download") if one.is_displayed()).click()

        def arrived() -> list[Path]:
            new = set(folder.iterdir()) - before  # while it is being written, it has another name, or two
            return [path for path in new if len(new) == 1 and path.suffix == ".json" and path.stat().st_size]

        return self.until(arrived)[0]


@pytest.fixture
def page(browser, study):
    page = Page(browser, (study / "page" / "index.html").as_uri())
    yield page
    assert page.complaints() == []


def said(rater: Rater) -> list[tuple[str, ...]]:
    return [(answer.left, answer.right, *answer.choices) for answer in rater.answers]


def judge_all(page: Page, rng: random.Random) -> list[tuple[str, ...]]:
    made = []
    while not page.one("#end").is_displayed():
        made.append(page.judge(*rng.choices(["left", "right", "tie"], k=2)))
    return made


@pytest.mark.parametrize("where", ["folder", "server"])
def test_a_rater_judges_every_pair_and_hands_in_what_was_said(page, study, served, browser, downloads, where):
    if where == "server":
        page = Page(browser, served)
    page.begin(f"Ann at a {where}")
    manifest, key = manifest_of(study), read_key(study / "key.json")
    made = []
    while not page.one("#end").is_displayed():
        assert page.one("#progress").text == f"{len(made) + 1} of 8"
        pair = next(one for one in manifest["pairs"] if sorted(page.images()) == sorted(one["images"]))
        assert page.one("#prompt").text == pair["prompt"], "what looks like HTML is text"
        made.append(page.judge(*random.Random(len(made)).choices(["left", "right", "tie"], k=2)))
    rater = read_answers(page.download(downloads), key)
    assert rater.name == f"Ann at a {where}"
    assert said(rater) == made
    assert {answer.pair for answer in rater.answers} == set(range(6))
    assert [first.left == again.right for first, again in rater.repeats()] == [True, True]
    address = page.browser.current_url.rpartition("/")[0]
    fetched = [url for url in page.requests() if url.partition(":")[0] in ("file", "http", "https")]
    assert {re.sub(r"\w+\.png", "N.png", url) for url in fetched} == {
        f"{address}/index.html",
        f"{address}/images/N.png",
    }
    words = ["count", str(study / "key.json"), *map(str, downloads.iterdir()), "--resamples", "100", "--least", "0"]
    assert cli(words) == 0


def test_a_rater_who_stops_goes_on_and_another_has_an_order_of_their_own(page, study, browser, downloads):
    page.begin("Bo")
    rng = random.Random(1)
    made = [page.judge("left", "tie"), page.judge("right", "left"), page.judge("tie", "tie")]
    page.press("1")  # half an answer is not kept
    early = read_answers(page.download(downloads), read_key(study / "key.json"))
    assert said(early) == made

    page = Page(browser, browser.current_url)
    assert page.one("#name").get_attribute("value") == "Bo"
    page.begin("  Bo ")
    assert page.one("#progress").text == "4 of 8"
    made += judge_all(page, rng)
    assert said(read_answers(page.download(downloads), read_key(study / "key.json"))) == made

    orders = {tuple(one[:2] for one in made)}
    for name in ("Cy", "Di", "Ed"):
        page = Page(browser, browser.current_url)
        page.begin(name)
        assert page.one("#progress").text == "1 of 8"
        orders.add(tuple(one[:2] for one in judge_all(page, rng)))
    assert len(orders) == 4


def test_what_was_said_can_be_taken_back(page, study, downloads):
    page.begin("Fay")
    first = page.images()
    page.press("1")
    assert page.question() == "2 of 2: Which is better drawn, whatever the text says?"
    page.press(Keys.BACKSPACE)
    assert page.question() == "1 of 2: Which fits the text better?"
    page.judge("left", "left")
    page.one("#back").click()
    page.until(page.ready)
    assert page.images() == first
    page.judge("right", "tie")
    while not page.one("#end").is_displayed():
        page.judge("tie", "tie")
    page.press(Keys.BACKSPACE)
    page.until(page.ready)
    page.judge("left", "left")
    rater = read_answers(page.download(downloads), read_key(study / "key.json"))
    assert said(rater)[0] == (*first, "right", "tie")
    assert rater.answers[-1].choices == ("left", "left")
    assert len(rater.answers) == 8


def test_kept_answers_that_are_damaged_do_no_harm(page, browser):
    kept = "judge ' + document.getElementById('manifest').dataset.study + ' Gus"
    for damage in ("{", "5", "null", '[{"pair": 99}]', "[null]"):
        browser.execute_script(f"localStorage.setItem('{kept}', arguments[0])", damage)
        page = Page(browser, browser.current_url)
        page.begin("Gus")
        assert page.one("#progress").text == "1 of 8"


def test_nothing_can_be_said_of_an_image_that_is_not_there(browser, study, tmp_path):
    (tmp_path / "index.html").write_text((study / "page" / "index.html").read_text())
    page = Page(browser, (tmp_path / "index.html").as_uri())
    page.one("#name").send_keys("Hal")
    page.one("#begin").click()
    page.until(page.one("#error").is_displayed)
    assert page.one("#error").text == "An image does not load; is the folder whole?"
    page.press("1")
    assert page.question().startswith("1 of 2")


def test_the_page_says_nothing_of_who_drew_what_and_everything_has_a_name(page):
    assert page.nameless() == []
    page.begin("Ida")
    assert page.nameless() == []
    html = page.browser.execute_script("return document.documentElement.outerHTML")
    assert json.dumps(PROMPTS[3])[1:-1] in html
    assert [img.get_attribute("alt") for img in page.all("img")] == ["", ""]


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    assert page.width_in(width) <= width
    page.begin("Joy")
    assert page.width_in(width) <= width
