"""The chat page: its headers and sources always, its behaviour where Chromium is installed."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from entrollm import Model
from entrollm.serve.api import Settings
from entrollm.serve.keys import Keys
from tests.serve.conftest import Serve
from tests.serve.running import Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_policy_lets_in_the_page_alone(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_page_names_no_other_host_and_writes_no_markup(client: httpx.Client) -> None:
    html = client.get("/").text
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " onclick", " style="):
        assert unsafe not in html
    # Every control has a name for those who cannot see it.
    for control in re.findall(r"<(?:select|textarea)[^>]*>", html):
        assert "aria-label" in control or "name=" in control


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, server: Running) -> Iterator[Any]:
    """A page of the shared server; any error of its script or its policy fails the test."""
    context = browser.new_context()
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda entry: problems.append(entry.text) if "Content Security" in entry.text else None)
    tab.goto(server.url)
    yield tab
    context.close()
    assert problems == []


def ask(tab: Any, text: str) -> None:
    tab.get_by_label("Your message").fill(text)
    tab.keyboard.press("Enter")


def limit(tab: Any, tokens: int) -> None:
    tab.get_by_role("button", name="Settings").click()
    tab.get_by_label("Longest answer in tokens").fill(str(tokens))
    tab.get_by_role("button", name="Done").click()


def test_send_stream_and_reload(tab: Any, server: Running) -> None:
    model: Model = server.models[0].model
    limit(tab, 20)
    ask(tab, "Who was the king?")
    tab.locator(".note", has_text="tokens/s").wait_for()
    tab.get_by_role("button", name="Send").wait_for()
    expected = model.chat([{"role": "user", "content": "Who was the king?"}], max_tokens=20).text
    assert tab.locator(".assistant .text").inner_text().strip() == expected.strip()
    assert re.fullmatch(r"20 tokens, \d+\.\d tokens/s", tab.locator(".note").inner_text())
    tab.reload()
    assert tab.locator(".user .text").inner_text() == "Who was the king?"
    assert tab.locator(".assistant .text").inner_text().strip() == expected.strip()
    tab.get_by_role("button", name="New chat").click()
    assert tab.locator(".message").count() == 0


def test_a_new_chat_ends_the_answer(tab: Any, server: Running) -> None:
    ask(tab, "Tell me everything.")
    tab.locator(".assistant .text", has_text=" ").wait_for()
    tab.get_by_role("button", name="New chat").click()
    limit(tab, 5)
    ask(tab, "Who was the king?")
    tab.locator(".note", has_text="5 tokens").wait_for()
    tab.get_by_role("button", name="Send").wait_for()
    tab.reload()
    assert tab.locator(".message").count() == 2
    server.wait_until_idle()


def test_stop_and_retry(tab: Any, server: Running) -> None:
    ask(tab, "Tell me everything.")
    tab.locator(".assistant .text", has_text=" ").wait_for()
    tab.keyboard.press("Escape")
    tab.locator(".note", has_text="stopped").wait_for()
    server.wait_until_idle()
    limit(tab, 5)
    tab.get_by_role("button", name="Retry").click()
    tab.locator(".note", has_text="5 tokens").wait_for()
    assert tab.locator(".assistant").count() == tab.locator(".user").count() == 1
    limit(tab, 400)
    ask(tab, "More.")
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_role("button", name="Send").wait_for()
    server.wait_until_idle()


def answer_with(text: str, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model write a text."""
    push = type(server.models[0].model.new_answer([5], continues_text=False)).push

    def said(self: Any, logits: Any) -> tuple[int, str]:
        token, _ = push(self, logits)
        self.finish_reason = "stop"
        return token, text

    monkeypatch.setattr("entrollm.engine.answer.AnswerText.push", said)


def test_what_models_write_is_escaped(tab: Any, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = (
        "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>\n```html\n<b>x</b>\n```\n"
    )
    answer_with(hostile + "then `<i>code</i>` & more", server, monkeypatch)
    ask(tab, "<u>mine</u>")
    tab.get_by_role("button", name="Send").wait_for()
    tab.locator(".assistant pre code", has_text="<b>x</b>").wait_for()
    assert tab.locator(".assistant .text").inner_text().startswith("<img src=x onerror=")
    assert tab.locator(".assistant .text > code").inner_text() == "<i>code</i>"
    assert tab.locator(".user .text").inner_text() == "<u>mine</u>"
    assert tab.locator("main img, main script, main b, main i, main u").count() == 0
    time.sleep(0.2)
    assert tab.title() == "EntroLLM"


def test_markdown(tab: Any, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "```python\nif x: # so\n    y = 'a # b'\n```"
    answer_with(f"## Head\nA **bold** 2 * 3 * 4 *word*.\n- one\n  2. two\n{code}\nEnd", server, monkeypatch)
    ask(tab, "x")
    tab.get_by_role("button", name="Send").wait_for()
    shown = tab.locator(".assistant .text")
    for selector, texts in (
        (".heading", ["Head"]),
        ("strong", ["bold"]),
        ("em", ["word"]),
        (".item", ["one", "two"]),
        (".mark", ["•", "2."]),
        (".keyword", ["if"]),
        (".comment", ["# so"]),
        (".string", ["'a # b'"]),
    ):
        found = [text.strip() for text in shown.locator(selector).all_inner_texts()]
        assert [text.split("\n")[-1] for text in found] == texts, selector
    assert "2 * 3 * 4" in shown.inner_text()
    assert shown.locator("pre").inner_text() == code.removeprefix("```python\n").removesuffix("\n```")


def test_an_error_is_shown(tab: Any) -> None:
    ask(tab, "word " * 700)
    tab.locator(".error", has_text="leaves no room for an answer").wait_for()
    tab.get_by_role("button", name="Send").wait_for()
    assert tab.locator(".assistant").count() == 0


@pytest.mark.parametrize(("width", "height"), [(360, 640), (1280, 800)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_desktops(browser: Any, server: Running, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(server.url)
    limit(tab, 30)
    ask(tab, "A" * 300)
    tab.locator(".note", has_text="30 tokens").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.get_by_role("button", name="Send").bounding_box()["y"] < height
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
    assert dark == (scheme == "dark")
    context.close()


def test_it_asks_for_the_key(browser: Any, serve: Serve) -> None:
    running = serve(settings=Settings(local_only=False), keys=Keys(["right"]))
    tab = browser.new_page()
    tab.goto(running.url)
    tab.locator(".error", has_text="the API key is missing or wrong").wait_for()
    tab.get_by_label("API key").fill("right")
    tab.get_by_label("Longest answer in tokens").fill("4")
    tab.get_by_role("button", name="Done").click()
    tab.locator("#model option", has_text="tiny").wait_for(state="attached")
    ask(tab, "Hi")
    tab.locator(".note", has_text="4 tokens").wait_for()
    assert tab.locator(".error").count() == 0
    tab.close()
    running.stop()
