"""The page in a real browser: Chromium, driven as a user would."""

import base64

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.images import read_image, read_settings

pytest.importorskip("selenium.webdriver", reason="needs the browser extra")

from chromium import MISSING, Window, chromium
from selenium.webdriver import ActionChains, Keys
from test_serve import serving

from jaxdiff.tools.serve.requests import Limits
from jaxdiff.tools.serve.worker import Worker

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


@pytest.fixture(scope="module")
def address(pipe):
    with serving(Worker(pipe, Limits())) as site:
        site.worker.start()
        yield f"http://127.0.0.1:{site.port}/"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as driver:
        yield driver


class Page(Window):
    """What a user sees and does."""

    def __init__(self, browser, address: str) -> None:
        super().__init__(browser, address)
        self.until(lambda: self.all("#steps"))

    def write(self, selector: str, text: object) -> None:
        self.one(selector).send_keys(Keys.CONTROL + "a" + Keys.NULL + Keys.BACKSPACE + str(text))

    def draw(self, **numbers: object) -> list[np.ndarray]:
        """Sets numbers, draws, and waits: the pictures."""
        for name, value in numbers.items():
            self.write(f"#{name}", value)
        if self.one("#fresh").is_selected():
            self.one("#fresh").click()
        self.one("#draw").click()
        self.until(self.one("#draw").is_enabled)
        return self.pictures()

    def pictures(self) -> list[np.ndarray]:
        """The stage's pictures, as the browser has them."""
        urls = self.browser.execute_async_script("""
            const answer = arguments[arguments.length - 1];
            const read = async (img) => {
              await img.decode();
              const made = document.createElement("canvas");
              [made.width, made.height] = [img.naturalWidth, img.naturalHeight];
              made.getContext("2d").drawImage(img, 0, 0);
              return made.toDataURL("image/png");
            };
            Promise.all([...document.querySelectorAll("#stage figure[data-done] img")].map(read)).then(answer);
        """)
        return [read_image(base64.b64decode(url.partition(",")[2])) for url in urls]

    def said(self) -> str:
        return self.one("#error").text


@pytest.fixture
def page(browser, address):
    page = Page(browser, address)
    yield page
    assert [text for text in page.complaints() if "status of 400" not in text] == []


def test_a_prompt_is_typed_and_its_picture_appears_and_is_downloaded_with_its_settings(page, pipe, address, downloads):
    assert page.one("#empty").is_displayed()
    page.one("#prompt").send_keys("a red apple")
    page.one("#negative_prompt").send_keys("blue")
    (drawn,) = page.draw(seed=5, steps=4)
    np.testing.assert_array_equal(drawn, pipe("a red apple", "blue", seed=5, steps=4)[0])
    assert not page.one("#empty").is_displayed()
    assert page.one("#told").text.startswith("Drawn in ")
    assert page.one("#stage img").get_attribute("alt") == "a red apple, seed 5"

    page.one(".download").click()
    file = downloads / "a-red-apple-5.png"
    page.until(file.exists)
    settings = read_settings(file)
    assert settings is not None
    assert {"prompt": "a red apple", "negative_prompt": "blue", "seed": 5, "steps": 4}.items() <= settings.items()
    np.testing.assert_array_equal(read_image(file), drawn)
    asked = [url for url in page.requests() if not url.startswith("chrome:")]  # the browser's own pages
    assert {url.partition(":")[0] if url.startswith(("data:", "blob:")) else url for url in asked} <= {
        "data", "blob", address, f"{address}api/info", f"{address}api/draw"
    }  # fmt: skip


def test_a_mask_is_painted_and_only_what_is_under_it_is_drawn_anew(page, pipe):
    page.one("#prompt").send_keys("a dog")
    (first,) = page.draw(seed=1, steps=3)
    page.one("figcaption button").click()  # use as image
    page.until(page.one("#mask").is_displayed)
    mask = page.one("#mask")
    width, height = mask.size["width"], mask.size["height"]
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mask)
    ActionChains(page.browser).move_to_element_with_offset(
        mask, width // 4, -height // 3
    ).click_and_hold().move_by_offset(0, 2 * height // 3).release().perform()
    assert float(page.one("#strength").get_attribute("value")) == 1, "with a mask, it begins from noise"
    (second,) = page.draw(seed=8, steps=3)
    assert page.said() == ""
    # The stroke runs down the right half; the brush is a sixth of the width.
    np.testing.assert_array_equal(second[:, :8], first[:, :8])
    assert np.abs(second[3:13, 11:13].astype(int) - first[3:13, 11:13]).mean() > 5

    page.one("#undo").click()
    assert not page.one("#undo").is_enabled()
    (third,) = page.draw(seed=8, steps=4, strength=0.5)
    np.testing.assert_array_equal(third, pipe("a dog", seed=8, steps=4, strength=0.5, image=first)[0])


def test_a_mask_is_painted_by_keys_alone(page, tmp_path):
    white = tmp_path / "white.png"
    Image.fromarray(np.full((20, 16, 3), 255, np.uint8)).save(white)
    page.one("#file").send_keys(str(white))
    page.until(page.one("#mask").is_displayed)
    page.one("#mask").send_keys(Keys.ARROW_RIGHT, Keys.SPACE, Keys.ARROW_DOWN, Keys.SPACE)
    assert page.one("#undo").is_enabled()
    page.one("#mask").send_keys(Keys.CONTROL, "zz")
    assert not page.one("#undo").is_enabled()
    page.one("#remove").click()
    assert not page.one("#easel").is_displayed()


def test_the_picture_is_seen_coming_into_being_and_can_be_cancelled(page):
    page.one("#prompt").send_keys("a dog")
    page.write("#steps", 150)
    page.write("#n", 8)
    page.one("#prompt").send_keys(Keys.CONTROL + Keys.ENTER)
    page.until(lambda: page.all("#stage img[src^='data:image/jpeg']"))
    page.until(lambda: "steps/s" in page.one("#rate").text)
    assert page.one("#bar").get_attribute("aria-valuenow") is not None
    page.one("#cancel").click()
    page.until(page.one("#draw").is_enabled)
    assert page.one("#told").text == "Cancelled."
    assert not page.one("#cancel").is_displayed()


def test_history_brings_settings_back(page):
    page.one("#prompt").send_keys("a dog")
    (first,) = page.draw(seed=3, steps=2, guidance=4)
    page.write("#prompt", "blue")
    page.draw(seed=9, steps=5, n=2)
    thumbnails = page.all("#history button")
    assert len(thumbnails) == 3
    assert len(page.all("#stage figure")) == 2
    thumbnails[-1].click()
    page.until(lambda: len(page.all("#stage figure")) == 1)
    values = {
        name: page.one(f"#{name}").get_attribute("value") for name in ("prompt", "seed", "steps", "guidance", "n")
    }
    assert values == {"prompt": "a dog", "seed": "3", "steps": "2", "guidance": "4", "n": "1"}
    np.testing.assert_array_equal(page.pictures()[0], first)
    (again,) = page.draw()
    np.testing.assert_array_equal(again, first)


def test_what_is_refused_is_said_on_the_page(page):
    page.one("#prompt").send_keys("a (dog")
    page.browser.execute_script("document.getElementById('steps').max = 5000")
    page.draw(steps=1500)
    assert "1500" in page.said()
    assert page.draw(steps=2)
    assert page.said() == ""
    assert "'('" in page.one("#warning").text


def test_everything_that_can_be_turned_has_a_name(page):
    page.one("summary").click()
    assert page.nameless() == []


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    assert page.width_in(width) <= width
