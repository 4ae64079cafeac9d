"""Templates that burn time or memory end their request; the next one is rendered as ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from makeready.engine.text import sandbox
from makeready.engine.text.chat import render_chat
from makeready.engine.text.parts import TextError

HELLO = [{"role": "user", "content": "hello"}]
FINE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TIME = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) > 0 }}",
    "{% macro m() %}{% for i in range(9999) %}{{ m() }}{% endfor %}{% endmacro %}{% for i in range(9999) %}"
    "{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}",
]
MEMORY = [
    "{{ 'a' * 2 ** 40 }}",
    "{% set n = namespace(x='a' * 1000) %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a' | center(10 ** 12) }}",
    "{{ '%999999999999d' | format(1) }}",
    "{{ [0] * 2 ** 33 }}",
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, sooner."""
    monkeypatch.setattr(sandbox.Sandbox.render, "__defaults__", (0.5,))


@pytest.mark.parametrize("template", TIME)
def test_a_template_that_burns_time_ends_its_request(template, quick):
    with pytest.raises(TextError, match=r"the chat template takes more than 0.5 s; shorten"):
        render_chat(template, HELLO)
    assert render_chat(FINE, HELLO) == "hello"


@pytest.mark.parametrize("template", MEMORY)
def test_a_template_that_burns_memory_ends_its_request(template):
    with pytest.raises(TextError, match=r"takes more than .* memory|OverflowError|MemoryError|too "):
        render_chat(template, HELLO)
    assert render_chat(FINE, HELLO) == "hello"


def test_a_process_that_was_ended_is_started_again():
    assert render_chat(FINE, HELLO) == "hello"
    process = sandbox.SANDBOX._process
    assert process is not None
    process.kill()
    process.wait()
    assert render_chat(FINE, HELLO) == "hello"


def test_the_process_outlives_the_thread_that_started_it():
    """And is not found dead while the next text is rendered."""
    for _ in range(3):
        sandbox.SANDBOX.close()
        thread = threading.Thread(target=render_chat, args=(FINE, HELLO))
        thread.start()
        thread.join()
        process = sandbox.SANDBOX._process
        assert process is not None
        while thread.native_id is not None and Path(f"/proc/self/task/{thread.native_id}").exists():
            time.sleep(0.001)  # Python counts it as ended sooner than the system
        assert render_chat(FINE, HELLO) == "hello"
        assert sandbox.SANDBOX._process is process


def test_every_text_comes_back_as_it_was_and_threads_do_not_mix_answers():
    odd = "\ud800 \U0001f600 \x00 é\u2028"
    assert render_chat(FINE, [{"role": "user", "content": odd}]) == odd
    made: dict[int, str] = {}

    def one(number: int) -> None:
        for _ in range(20):
            made[number] = render_chat(FINE, [{"role": "user", "content": str(number) * 5000}])
            assert made[number] == str(number) * 5000

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4


def test_long_messages_are_no_burning():
    long = [{"role": "user", "content": "word " * 2_000_000}]
    assert len(render_chat(FINE, long)) == 10_000_000


@pytest.mark.parametrize("value", [lambda: None, threading.Lock(), object])
def test_what_cannot_be_sent_is_said(value: Any):
    def inside() -> Any:
        return value

    with pytest.raises(TextError, match="must be plain values"):
        render_chat(FINE, HELLO, tools=[{"function": inside}])
