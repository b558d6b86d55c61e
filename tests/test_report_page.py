"""The report's page in headless Chromium: it draws, filters, obeys the keyboard, and never what a policy wrote."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api
from report_runs import HOSTILE, answer, problem, write_run

from cipo_fast.report.page import write_page

CHROMIUM = shutil.which("chromium")
# Nothing is looked up on a network that is not there.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()

LOCAL = ("file:", "data:", "blob:")
LONG = 100_000  # tokens of one answer
PAIRS = [("the cat sat on the mat", "the dog sat on a mat"), ("", "new"), ("same", "same"), ("abcabba", "cbabac")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium: .ci/run installs it")
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    lines = problem("one") + problem("two", "1 7", source="b")
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", rollouts={1: lines, 6: problem("last")})
    shutil.copytree(folder / "evaluations/step-00006", folder / "evaluations/model-n64")
    return page_of(tmp_path_factory.mktemp("plain"), folder)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose rollouts are hostile, or hard to tell from their corrections."""
    asked = {"prompt": "q", "answer": "a", "source": "s"}
    pairs = [{**asked, "problem": "pairs", **answer(a, False), "corrections": [answer(b, True)]} for a, b in PAIRS]
    hostile = problem(HOSTILE, HOSTILE, HOSTILE + "!", source=HOSTILE)
    hostile[0]["why"] = HOSTILE
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", rollouts={1: hostile, 3: pairs})
    (folder / "config.yaml").write_text(f"seed: 0\nmodel: {{path: {HOSTILE[:30]!r}}}\n", encoding="utf-8")
    return page_of(tmp_path_factory.mktemp("hard"), folder)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with one very long answer, and a correction of it that goes on."""
    text = "a " * (LONG // 2)
    stats = {"token_texts": ["a", " "] * (LONG // 2), "sampler_logps": [-1.0, -4.0] * (LONG // 2)}
    asked = {"problem": "long", "prompt": "q", "answer": "a", "source": "s"}
    line = {**asked, **answer(text, False, **stats), "corrections": [answer(text + "end", True)]}
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", rollouts={1: [line]})
    return page_of(tmp_path_factory.mktemp("long"), folder)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two seeds and another run."""
    there = tmp_path_factory.mktemp("runs")
    runs = [write_run(there / f"cipo_s{seed}", f"seed={seed}") for seed in (0, 1)]
    runs.append(write_run(there / "grpo", "correction.lambda_corr=0"))
    return page_of(tmp_path_factory.mktemp("several"), *runs)


def page_of(there: Path, *runs: Path) -> Path:
    write_page(runs, there / "report.html")
    return there / "report.html"


class Opened:
    """A page that is drawn. At the end nothing may have been said on its console or asked of a network."""

    def __init__(self, browser: Any, file: Path, **how: Any):
        self.page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, "accept_downloads": True, **how})
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on(
            "request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or self.said.append(asked.url)
        )
        self.page.set_default_timeout(10_000)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=20_000)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        self.page.close()
        assert kind is not None or self.said == []


def test_all_sections_are_drawn(browser: Any, plain: Path) -> None:
    with Opened(browser, plain) as page:
        assert page.title() == "run · cipo_fast"
        assert page.locator("main h1, main h2").all_inner_texts() == ["run", "Curves", "Rollouts", "Compare"]
        since = page.locator("h3", has_text="Evaluated since").locator("+ .scroll")
        assert re.match(r"model-n64\s+0\.\d{3}", since.locator("tbody tr").inner_text())
        drawn = page.locator("figure canvas")
        assert drawn.count() >= 10
        assert "no_variance" in page.locator(".alarm").inner_text()
        assert page.locator("#about table").first.locator("tbody tr").count() >= 6
        assert "uPlot 1.6.32, MIT licence" in page.locator("footer").inner_text()
        assert page.locator("#compare-said").inner_text().startswith("5 won, 1 lost of 8 problems")
        # ink on the first chart, not an empty canvas
        colours = page.evaluate("""() => {
            const c = document.querySelector("figure canvas");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 4).join())).size }""")
        assert colours > 20


def test_rollouts_are_filtered(browser: Any, plain: Path) -> None:
    with Opened(browser, plain) as page:
        listed = page.locator("#problem-list li")
        assert listed.count() == 3
        page.locator("#filter-step").select_option("6")
        assert listed.count() == 1
        page.locator("#filter-step").select_option("")
        page.locator("#filter-source").select_option("b")
        assert listed.all_inner_texts()[0].startswith("what is two?")
        page.locator("#filter-source").select_option("")
        page.locator("#filter-flip").select_option("right > wrong")
        assert page.locator("#rollouts-said").inner_text().startswith("0 problems")
        assert page.locator("#problem").inner_text() == "Nothing matches."
        page.locator("#filter-flip").select_option("wrong > right")
        page.locator("#filter-verdict").select_option("right")
        page.locator("#search").fill("1 7")
        sync_api.expect(listed).to_have_count(1)


def test_a_problem_is_a_tree(browser: Any, plain: Path) -> None:
    with Opened(browser, plain) as page:
        attempts = page.locator(".tree > li")
        assert attempts.count() == 2
        assert attempts.nth(0).locator("ul > li").count() == 2
        first = attempts.nth(0).locator("ul > li").nth(0)
        assert "wrong → right" in first.inner_text()
        assert "advantage +0.700" in first.inner_text()
        assert "not the answer" in attempts.nth(0).locator(".node").first.inner_text()
        first.get_by_role("button", name="side by side").click()
        assert first.locator("del").all_inner_texts() == ["2"]
        assert first.locator("ins").all_inner_texts() == ["3"]


def test_tokens_are_coloured(browser: Any, plain: Path) -> None:
    with Opened(browser, plain) as page:
        for by in ("logp", "gap", "entropy"):
            page.locator("#colour").select_option(by)
            coloured = page.locator(".tree > li > .text span[style*=background]")
            assert coloured.count() > 0
        assert coloured.first.get_attribute("title") == "log-prob 0, gap 0.01, entropy 0.3"
        box, said = page.locator(".tree > li > .text").first, page.locator(".tree [role=status]").first
        coloured.first.click()  # a tap
        assert said.inner_text().endswith(": log-prob 0, gap 0.01, entropy 0.3")
        box.focus()
        first = said.inner_text()
        page.keyboard.press("ArrowRight")
        assert said.inner_text() != first
        assert box.locator(".chosen").count() == 1
        for _ in range(2):
            page.keyboard.press("ArrowLeft")  # stays at the first
        assert said.inner_text() == first


def test_the_keyboard_is_enough(browser: Any, plain: Path) -> None:
    with Opened(browser, plain) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.press("Escape")
        page.evaluate("document.activeElement.blur()")
        current = page.locator("[aria-current]")
        before = current.inner_text()
        page.keyboard.press("j")
        assert current.inner_text() != before
        page.keyboard.press("k")
        assert current.inner_text() == before
        current.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert current.inner_text() != before
        assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
        figure = page.locator("figure", has_text="Accuracy of rollouts")
        figure.focus()
        value = figure.locator(".u-legend .u-value").nth(1)
        page.keyboard.press("ArrowRight")
        assert value.inner_text() == "0.31"
        page.keyboard.press("ArrowRight")
        assert value.inner_text() == "0.32"
        page.locator("#theme").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"


def test_hostile_rollouts_are_inert_and_visible(browser: Any, hard: Path) -> None:
    with Opened(browser, hard) as page:
        assert page.evaluate("window.pwned") is None
        assert page.locator("main script, main img").count() == 0
        shown = page.locator(".tree > li > .text").first.inner_text()
        assert "<script>window.pwned = 1</script><img src=x" in shown
        assert "⟨U+202E⟩evil⟨U+202C⟩" in shown
        assert "␛[31mred␛[0m nul␀" in shown
        assert "⟨U+2028⟩line⟨U+200B⟩" in shown
        assert "⟨U+D800⟩" in shown
        assert "@SCRIPT@" in shown
        for by in ("logp", "entropy"):
            page.locator("#colour").select_option(by)
        page.locator(".tree ul button").first.click()
        everything = page.locator("body").inner_text()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u2028\u202a-\u202e\u2066-\u2069]", everything)
        assert page.evaluate("window.pwned") is None


def test_a_hundred_thousand_tokens_freeze_nothing(browser: Any, long: Path) -> None:
    with Opened(browser, long) as page:
        started = time.perf_counter()
        page.locator("#colour").select_option("logp")
        page.locator(".tree ul button").first.click()  # attempt and correction side by side
        assert page.locator(".sides .text").count() == 2
        assert time.perf_counter() - started < 10  # about half a second on an idle machine
        box = page.locator(".tree > li > .text").first
        laid_out = box.locator("span").count()
        assert 100 < laid_out < 10_000
        box.evaluate("box => box.scrollTo(0, box.scrollHeight)")
        sync_api.expect(box.locator("span").nth(laid_out + 100)).to_be_attached()
        assert page.locator("body *").count() < 20_000


def test_differences_leave_both_texts_whole(browser: Any, hard: Path) -> None:
    with Opened(browser, hard) as page:
        page.locator("#filter-step").select_option("3")
        for toggle in page.locator(".tree ul button").all():
            toggle.click()
        sides = page.locator(".sides").evaluate_all("""all => all.map((s) => [...s.querySelectorAll(".text")].map(t => {
            const kept = t.cloneNode(true);
            kept.querySelectorAll("del, ins").forEach((n) => n.remove());
            return [t.textContent, kept.textContent];
        }))""")
        assert [(a[0], b[0]) for a, b in sides] == PAIRS
        assert [a[1] == b[1] for a, b in sides] == [True] * len(PAIRS)  # what is not marked is common
        assert [a[1] for a, _ in sides] == ["the  sat on  mat", "", "same", sides[3][0][1]]
        assert len(sides[3][0][1]) == 4  # the longest common subsequence of Myers' own example


def test_charts_are_saved_as_picture_and_table(browser: Any, plain: Path, tmp_path: Path) -> None:
    with Opened(browser, plain) as page:
        figure = page.locator("figure", has_text="Accuracy of rollouts")
        for kind in ("PNG", "CSV"):
            with page.expect_download() as download:
                figure.get_by_role("button", name=kind).click()
            download.value.save_as(tmp_path / kind)
            assert download.value.suggested_filename == f"accuracy-of-rollouts.{kind.lower()}"
        assert (tmp_path / "PNG").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "CSV").read_text().splitlines()[:2] == ["line,step,value,low,high", "rollouts,1,0.31,,"]


def test_several_runs_and_seeds(browser: Any, several: Path) -> None:
    with Opened(browser, several) as page:
        figure = page.locator("figure", has_text="Accuracy of rollouts")
        assert figure.locator(".u-legend tr:not(.aux) .u-label").all_inner_texts() == ["step", "cipo", "grpo"]
        assert figure.locator(".u-legend .u-value").nth(1).inner_text() == "0.365"  # the mean of both seeds
        page.locator("#log-axis").check()
        page.locator("#smoothing").fill("0.6")
        page.locator("#x-axis").select_option("sampled")
        assert figure.locator(".u-legend .u-label").first.inner_text() == "sampled"
        page.locator("#filter-run").select_option("2")
        assert page.locator("#problem-list li").count() == 3
        assert page.locator("#compare-a").locator("option").count() == 6
        page.locator("#compare-a").select_option(label="grpo, before")
        page.locator("#compare-b").select_option(label="grpo, step 6")
        page.locator("#compare-show").select_option("lost")
        assert page.locator("#compared tbody tr").count() == 1
        page.locator("#compared td button").click()
        assert "question 0" in page.locator("#compared .wide .text").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it(browser: Any, several: Path, scheme: str) -> None:
    with Opened(browser, several, viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("figure").first.bounding_box()["width"] <= 360
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert dark == (scheme == "dark")


def test_paper_shows_it(browser: Any, plain: Path) -> None:
    with Opened(browser, plain, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert not page.locator("header").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert len(page.pdf()) > 10_000
