"""The page in headless Chromium: no console errors under its policy, chat, preview and apply."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if os.environ.get("FULCRUM_REQUIRE_BROWSER"):
    from playwright.sync_api import expect, sync_playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    expect, sync_playwright = playwright.expect, playwright.sync_playwright
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt: chromium)", allow_module_level=True)

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP = {"width": 1360, "height": 900}
PHONE = {"width": 390, "height": 844}
SLOW_MS = 60_000
KEY = "page-test-key"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM is not None, "FULCRUM_REQUIRE_BROWSER is set and there is no chromium"
    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, url: str, size: dict[str, int] = DESKTOP) -> Iterator[Any]:
    """A page; at the end nothing may have gone wrong on its console or left this machine."""
    context = browser.new_context(viewport=size)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(url) else problems.append(f"asked for {request.url}")
        ),
    )
    page.goto(url)
    yield page
    context.close()
    assert problems == []


def _ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_chat_streams_and_an_apply_switches_the_level_meanwhile(
    browser: Any, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = start_server("--receipts", str(tmp_path / "receipts"), "--kv-memory", "256MiB")
    with opened(browser, server.url) as page:
        expect(page.locator("#health-text")).to_have_text("ok")
        expect(page.locator("#model-formats")).to_contain_text("int4 (210)")
        bars = page.get_by_role("img", name=re.compile("^(Today|Proposed): Weights"))
        expect(bars).to_have_count(1, timeout=SLOW_MS)

        _ask(page, "Write a very long story about a river, with many chapters.")
        answer = page.locator(".message.assistant")
        expect(answer).to_contain_text("tokens/s", timeout=SLOW_MS)

        page.get_by_label("int8").first.check(force=True)
        expect(bars).to_have_count(2, timeout=SLOW_MS)
        apply = page.get_by_role("button", name="Apply")
        expect(apply).to_be_enabled(timeout=SLOW_MS)
        apply.click()
        receipt = page.locator("#apply-status .receipt")
        expect(receipt).to_contain_text("Weights auto → int8", timeout=SLOW_MS)
        expect(receipt.locator(".outcome")).to_have_text("kept")
        expect(page.locator("#model-formats")).to_contain_text("int8 (211)")
        expect(page.locator(".message.assistant[aria-busy]")).to_have_count(0, timeout=SLOW_MS)
        expect(answer).not_to_have_class(re.compile("error"))
        expect(page.locator("#receipts .receipt")).to_have_count(1)

        page.get_by_label("Lookup").check(force=True)
        expect(apply).to_be_enabled(timeout=SLOW_MS)
        apply.click()
        expect(receipt).to_contain_text("Speculation auto → ngram", timeout=SLOW_MS)
        expect(page.locator("#receipts .receipt")).to_have_count(2)


def test_the_page_fits_a_phone_and_needs_the_key_that_is_set(
    browser: Any, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server("--api-key", KEY, "--kv-memory", "64MiB")
    context = browser.new_context(viewport=PHONE)
    page = context.new_page()
    page.goto(server.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key").fill(KEY)
    dialog.get_by_role("button", name="Use key").click()
    expect(page.locator("#model-formats")).to_contain_text("int4", timeout=SLOW_MS)
    expect(page.locator(".levels-table")).to_be_visible()
    width = page.locator("html").evaluate("html => html.scrollWidth")
    assert width <= PHONE["width"], "the page scrolls sideways"
    for choices in page.locator(".segments").all():
        assert choices.evaluate("c => c.scrollWidth <= c.clientWidth"), "a choice is cut off"
    # Every control can be named by a screen reader.
    for control in page.locator("button, input, textarea").all():
        name = control.evaluate(
            "c => c.ariaLabel || c.textContent.trim() || c.labels?.[0]?.textContent"
        )
        assert name, control
    context.close()


def test_sliders_and_levels_answer_to_the_keyboard(
    browser: Any, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server("--kv-memory", "64MiB")
    with opened(browser, server.url) as page:
        slider = page.get_by_label("Longest sequence")
        expect(slider).to_be_visible(timeout=SLOW_MS)
        before = slider.get_attribute("aria-valuetext")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext") != before
        page.locator("input[name=kv_dtype]").first.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("input[name=kv_dtype][value=int8]")).to_be_checked()
        expect(page.get_by_role("button", name="Reset")).to_be_enabled()
        page.get_by_role("button", name="Reset").click()
        expect(page.locator("input[name=kv_dtype][value=bf16]")).to_be_checked()
