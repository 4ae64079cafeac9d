"""The page in a browser, before a real model: what it shows, what it asks for, and what text can do to it."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from in_process import served
from server_process import WAIT_SECONDS, ServerProcess, until

from makeready.engine.server.settings import ServerSettings

api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium; apt-get install chromium"),
]
SECONDS = 60_000  # milliseconds, for whatever is waited for
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[one](javascript:window.hacked=3) [two](JaVaScRiPt&#58;window.hacked=4) [three](data:text/html,<script>1</script>)
![pixel](https://example.com/pixel.png) <https://example.com> <style>body{display:none}</style>

<iframe srcdoc="<script>parent.hacked=5</script>"></iframe><form action=//example.com><input></form>
<svg><animate onbegin=window.hacked=6 attributeName=x dur=1s></svg><details open ontoggle=window.hacked=7>

```html
<script>window.hacked = 8</script><img src=x onerror=window.hacked=9>
```

| <b onmouseover=window.hacked=10>a</b> |
|---|
| **fine** |
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def errors() -> list[str]:
    """What the console said of errors; a test empties it of those that it wants."""
    return []


@pytest.fixture
def page(browser: Any, server: ServerProcess, errors: list[str]) -> Iterator[Any]:
    """The page of the model; nothing may go wrong in it."""
    made = opened(browser, server.url, errors)
    yield made
    made.context.close()
    assert not errors


def opened(browser: Any, url: str, errors: list[str], **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}} | options)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.on("console", lambda said: errors.append(said.text) if wrong(said) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(url)
    return page


def wrong(said: Any) -> bool:
    """Whether a line of the console tells of something; that tests read canvases is theirs alone."""
    return said.type in ("error", "warning") and "getImageData" not in said.text


def say(page: Any, text: str, **settings: Any) -> None:
    if settings:
        page.click("text=Sampling, schema, tools")
        for name, value in settings.items():
            page.fill(f"[name={name}]", str(value))
        page.click("text=Sampling, schema, tools")
    page.fill("[name=prompt]", text)
    page.keyboard.press("Enter")


def true(page: Any, expression: str, seconds: float = SECONDS / 1000) -> None:
    """Wait until an expression holds; the policy lets no page wait for one itself."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def figure(server: ServerProcess, name: str) -> float:
    """A figure of /metrics."""
    text = httpx.get(server.url + "/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def shown_by_pieces(page: Any) -> None:
    """Let answers reach the page event by event, each once the one before was drawn, and note what it shows.

    What a busy machine reads at once would be drawn at once.
    """
    page.evaluate(
        """() => {
            const drawn = () => new Promise((then) => requestAnimationFrame(() => setTimeout(then)));
            const text = () => document.querySelector('.assistant .text')?.innerText ?? '';
            window.shown = new Set();
            new MutationObserver(() => window.shown.add(text())).observe(document.body,
                {subtree: true, childList: true, characterData: true});
            const ask = window.fetch;
            window.fetch = async (...what) => {
                const answer = await ask(...what);
                if (!answer.headers.get('content-type')?.startsWith('text/event-stream')) return answer;
                const pieces = new TransformStream({async transform(text, to) {
                    for (const event of text.split(/(?<=\\n\\n)/)) { to.enqueue(event); await drawn(); }
                }});
                const body = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(pieces)
                    .pipeThrough(new TextEncoderStream());
                return new Response(body, {status: answer.status, headers: answer.headers});
            };
        }"""
    )


def test_an_answer_streams_and_is_the_servers(page: Any, server: ServerProcess) -> None:
    question = "What is a compiler? Answer in two sentences."
    shown_by_pieces(page)
    say(page, question, temperature=0, maxTokens=60)
    page.locator(".facts").wait_for()
    assert len(page.evaluate("[...window.shown]")) > 10
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
    whole = httpx.post(server.url + "/v1/chat/completions", json=body).json()
    assert words(page.locator(".assistant .text").inner_text()) == words(
        whole["choices"][0]["message"]["content"]
    )
    facts = page.locator(".facts").inner_text()
    assert f"{whole['usage']['completion_tokens']} tokens" in facts
    assert "tokens/s" in facts
    assert "prompt tokens cached" in facts
    # Its life, by its id.
    page.click("text=its life")
    life = page.locator(".dialog").inner_text()
    assert f"{whole['usage']['prompt_tokens']} prompt tokens" in life
    assert re.search(r"queued.*prefill of.*first token.*finished: (length|stop)", life, re.DOTALL)
    say(page, "And what is an interpreter?")  # the conversation goes on, over what is cached of it
    page.locator(".facts").nth(1).wait_for()
    cached = re.search(r"(\d+) of (\d+) prompt tokens cached", page.locator(".facts").nth(1).inner_text())
    assert cached
    assert int(cached[1]) > 0


def test_a_schema_binds_the_answer(page: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    page.click("text=Sampling, schema, tools")
    page.fill("[name=schema]", "{not json")
    page.fill("[name=prompt]", "x")
    assert page.locator(".send").is_disabled()
    page.click("text=Sampling, schema, tools")
    say(page, "Where is the Eiffel tower?", schema=json.dumps(schema), maxTokens=50)
    page.locator(".facts").wait_for()
    assert json.loads(page.locator(".assistant .text").inner_text())["city"] in ("Paris", "Rome")


def test_stop_ends_the_request(page: Any, server: ServerProcess) -> None:
    ended = 'makeready_requests_total{reason="abort"}'
    before = figure(server, ended)

    def endless(route: Any) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    page.route("**/v1/chat/completions", endless)
    say(page, "Count from one to a thousand in words.", maxTokens=450)
    true(page, "document.querySelector('.assistant .text')?.innerText.length > 10")
    page.click(".stop")
    page.locator(".facts .reason").wait_for()
    assert page.locator(".facts .reason").inner_text() == "stopped"
    until(lambda: figure(server, ended) == before + 1)
    until(lambda: figure(server, "makeready_running_requests") == 0)
    assert page.locator(".send").count() == 1


def answered_with(page: Any, *deltas: dict[str, Any]) -> None:
    """Let the next answers consist of these, whatever is asked."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream", "x-request-id": "none"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, headers=headers, body=text))


def test_hostile_text_is_only_text(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answered_with(page, {"reasoning_content": HOSTILE}, *({"content": char} for char in HOSTILE))
    say(page, "<img src=x onerror=window.hacked=11>")
    page.locator(".facts").wait_for()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    kinds = page.evaluate(
        "[...new Set([...document.querySelectorAll('.messages *')].map((each) => each.localName))]"
    )
    assert not {"script", "img", "iframe", "style", "form", "svg", "object"} & set(kinds)
    handlers = "[...document.querySelectorAll('.text *')].flatMap((each) => each.getAttributeNames())"
    assert set(page.evaluate(handlers)) <= {"href", "target", "rel", "class"}
    links = page.evaluate("[...document.querySelectorAll('.text a')].map((each) => each.href)")
    assert set(links) <= {"", "https://example.com/", "https://example.com/pixel.png"}
    assert "https://example.com/" in links
    assert page.locator(".text strong").inner_text() == "fine"
    assert "window.hacked = 8" in page.locator(".text pre").inner_text()
    assert all(not url.startswith("https://example.com") for url in asked)


def test_the_browser_holds_to_the_policy(page: Any, errors: list[str]) -> None:
    write = "document.querySelector('.empty').innerHTML = '<b>x</b>'"
    with pytest.raises(api.Error, match="TrustedHTML"):
        page.evaluate(write)
    page.evaluate(
        "const made = document.createElement('style'); made.textContent = 'body {display: none}'; "
        "document.head.append(made)"
    )
    assert page.locator(".engine").is_visible()
    until(lambda: errors or page.wait_for_timeout(50))
    assert all("Content Security Policy" in error or "TrustedHTML" in error for error in errors)
    errors.clear()


def test_reasoning_is_folded_and_calls_are_shown(page: Any) -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "get_weather", "arguments": '{"city": '}}
    more = {"index": 0, "function": {"arguments": '"Paris"}'}}
    answered_with(page, {"reasoning_content": "Let me see."}, {"tool_calls": [call]}, {"tool_calls": [more]})
    say(page, "How is the weather?")
    page.locator(".result input").wait_for()
    assert page.locator(".reasoning p").is_hidden()
    page.click(".reasoning summary")
    assert page.locator(".reasoning p").inner_text() == "Let me see."
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": "Paris"}
    page.unroute("**/v1/chat/completions")
    answered_with(page, {"content": "It rains."})
    with page.expect_request("**/v1/chat/completions") as asked:
        page.fill(".result input", "rain")
        page.click("text=Reply")
    sent = asked.value.post_data_json["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == "call_1"
    assert sent[2]["content"] == "rain"


def test_it_draws_under_load(page: Any, server: ServerProcess) -> None:
    done = threading.Event()

    def client(number: int) -> None:
        while not done.is_set():
            body = {
                "prompt": f"{number} once upon a time" * (1 + 9 * (number % 3)),
                "max_tokens": 40,
                "ignore_eos": True,
            }
            httpx.post(server.url + "/v1/completions", json=body, timeout=WAIT_SECONDS).raise_for_status()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    try:
        true(page, "document.querySelectorAll('.requests tbody tr').length >= 12")
        true(page, "document.querySelector('.requests .done') !== null")
        painted = """() => [...document.querySelectorAll('.strip, .plot canvas')].map((canvas) => {
            const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(pixels.buffer)).size;
        })"""
        true(page, f"({painted})().length === 4 && ({painted})().every((colours) => colours > 2)")
        tile = (
            "[...document.querySelectorAll('.tile')].find((each) => each.innerText.includes('%s')).innerText"
        )
        true(page, f"/^8\\s*.\\s*8\\s/.test({tile % 'running'})")
        true(page, f"Number.parseInt({tile % 'waiting'}) > 0")
        assert re.search(
            r"(decode|extend)-\d+.*rows?, \d+ of \d+ tokens", page.locator(".engine .note").first.inner_text()
        )
        page.locator(".requests .state.done").first.click()
        life = page.locator(".dialog").inner_text()
        assert re.search(
            r"queued.*began to run.*prefill of.*first token.*40 tokens.*finished: length", life, re.DOTALL
        )
    finally:
        done.set()
        for thread in threads:
            thread.join()
    # The cost model is asked in a process of little priority, so it may take a while.
    true(page, "/predicted \\d/.test(document.querySelector('.engine .note').innerText)", 300)


def test_it_asks_for_a_key(browser: Any, errors: list[str]) -> None:
    with served(ServerSettings(["fake"], api_keys=["secret"])) as server:
        page = opened(browser, server.url, errors)
        page.fill("[name=key]", "wrong")
        page.click("text=Use it")
        page.locator(".lock").wait_for()
        assert page.locator(".dot.on").count() == 0
        page.fill("[name=key]", "secret")
        page.click("text=Use it")
        page.locator(".dot.on").wait_for()
        assert page.locator(".lock").count() == 0
        page.context.close()
    assert all("401" in error for error in errors)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, server: ServerProcess, errors: list[str], scheme: str) -> None:
    page = opened(browser, server.url, errors, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    answered_with(page, {"content": HOSTILE + "x" * 500 + "\n```\n" + "y" * 500 + "\n```"})
    say(page, "z" * 300, schema="{}")
    page.locator(".facts").wait_for()
    for side in ("Chat", "Engine"):
        page.click(f"[role=tab]:has-text('{side}')")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
        assert page.locator(f"section.{side.lower()}").is_visible()
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 384) == (scheme == "light")
    page.context.close()
    assert not errors
