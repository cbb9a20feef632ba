"""Reports in a real browser: they draw, answer to pointing, ask the network for nothing, and Hangul is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import KOREAN, small_model
from test_written import SOURCE, TARGET, translator

from unrolled.report import Report, inspect
from unrolled.trace import record

SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A sandbox of its own is not to be had as root, as CI runs; the others keep the browser itself from calling home.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here: on Debian and Ubuntu, apt install chromium fonts-noto-cjk")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page that was opened, with what it complained of and asked the network for."""

    def __init__(self, browser: Any, report: Report, path: Path, **settings: Any) -> None:
        report.save(path)
        self.path = path
        self.page = browser.new_page(**settings)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)

    def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def translation(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    trace = record(translator(torch.float32), SOURCE, expected=TARGET, gradient=True, at=-1)
    return Opened(browser, inspect(trace), tmp_path_factory.mktemp("browser") / "translation.html")


def test_it_draws_every_figure_and_asks_the_network_for_nothing(translation: Opened) -> None:
    drawn = translation.page.evaluate(
        """[...document.querySelectorAll(".figure")].map((place) => {
            const box = place.querySelector(".main-svg").getBoundingClientRect();
            return [box.width > 100 && box.height > 40,
                    place.querySelectorAll(
                        ".heatmaplayer image, .scatterlayer path, .scatterlayer text, .barlayer path").length];
        })"""
    )
    assert len(drawn) == int(translation.page.evaluate("document.documentElement.dataset.drawn")) > 4
    assert all(large and marks > 0 for large, marks in drawn), drawn
    translation.keep("translation")
    assert translation.wrong == []
    assert {url for url in translation.asked if not url.startswith(("data:", "blob:"))} == {translation.path.as_uri()}


def test_pointing_at_a_written_word_shows_its_row(translation: Opened) -> None:
    page = translation.page
    weights = inspect(record(translator(torch.float32), SOURCE, expected=TARGET)).traces[""].attention
    for u in (0, 2):
        page.hover(f".target .word >> nth={u}")
        strongest = int(weights[u].argmax())
        line = page.inner_text(".row")
        assert line.startswith(f"{TARGET.split()[u]} looks at {SOURCE.split()[strongest]} ")
        tints = page.evaluate(
            "[...document.querySelectorAll('.source .word')].map((w) => "
            "parseFloat(w.style.backgroundColor.match(/([\\d.]+)\\)$/)[1]))"
        )
        torch.testing.assert_close(torch.tensor(tints) / 0.75, weights[u], atol=0.01, rtol=0)
        row = page.evaluate("document.querySelector('#attention .figure').layout.shapes[0]")
        assert (row["y0"], row["y1"]) == (u - 0.5, u + 0.5)
    page.mouse.move(0, 0)
    assert page.inner_text(".row").startswith("Point at a word")


def test_pointing_at_the_heat_map_shows_the_row(translation: Opened) -> None:
    page = translation.page
    page.locator("#attention .figure").scroll_into_view_if_needed()
    at = page.evaluate(
        """(() => {
            const place = document.querySelector("#attention .figure"), { xaxis, yaxis } = place._fullLayout;
            const box = place.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(0), box.top + yaxis._offset + yaxis.d2p(1)];
        })()"""
    )
    page.mouse.move(*at)
    page.wait_for_selector(".target .word.here")
    assert page.inner_text(".target .word.here").strip() == TARGET.split()[1]
    page.mouse.move(0, 0)


def test_hangul_is_drawn(browser: Any, tmp_path: Path) -> None:
    """Two syllables look different, and neither looks like a character that no font has."""
    opened = Opened(
        browser, inspect(small_model(text=KOREAN, dtype=torch.float32), "나는 학교에 갑니다."), tmp_path / "ko.html"
    )
    drawn = opened.page.evaluate(
        """(() => {
            const font = getComputedStyle(document.body).fontFamily;
            const picture = (text) => {
                const canvas = document.createElement("canvas");
                canvas.width = canvas.height = 48;
                const pen = canvas.getContext("2d");
                pen.font = `32px ${font}`;
                pen.fillText(text, 4, 38);
                return [canvas.toDataURL(), pen.getImageData(0, 0, 48, 48).data.some((byte) => byte > 0)];
            };
            return ["한", "글", "\\u{10FFFD}"].map(picture);
        })()"""
    )
    (first, ink), (second, more), (missing, _) = drawn
    assert ink
    assert more
    assert len({first, second, missing}) == 3
    assert "학" in opened.page.inner_text("#answer")
    assert opened.page.locator("#units .figure text", has_text="학").count() >= 1
    opened.keep("korean")
    assert opened.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_aside(browser: Any, tmp_path: Path, scheme: str) -> None:
    trace = record(translator(torch.float32), SOURCE, expected=TARGET, gradient=True, at=-1)
    phone = {"width": 390, "height": 800}
    opened = Opened(browser, inspect(trace), tmp_path / "t.html", viewport=phone, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, card = opened.page.evaluate(
        "[document.querySelector('.figure').layout.font.color, document.querySelector('.figure').layout.paper_bgcolor]"
    )
    bright = {"light": "#ffffff", "dark": "#1c2129"}
    assert card == bright[scheme]
    assert ink != card
    opened.keep(f"phone-{scheme}")
