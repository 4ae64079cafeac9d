"""Stop strings and patterns in pieces, against a search of the whole text."""

import re
import resource
import unicodedata
import warnings
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from makeready.engine.text import stop as stop_module
from makeready.engine.text.parts import TextError
from makeready.engine.text.patterns import translated
from makeready.engine.text.stop import REGEX_WINDOW, StopMatcher


def search(text, strings, regexes, include, window=REGEX_WINDOW):
    """What the matcher promises, from its docstring, on the whole text at once: (shown, matched)."""
    hits = [(text.find(string), -len(string), string) for string in strings if string in text]
    string = min(hits, default=None)
    seen = len(text) if string is None else string[0] - string[1]
    regex = None
    for end in range(1, seen + 1):
        found = [re.compile(pattern).search(text, max(0, end - window), end) for pattern in regexes]
        spans = [(m.start(), m.start() - m.end(), m.re.pattern) for m in found if m]
        if spans:
            regex = min(spans, key=lambda span: span[:2])
            break
    candidates = [hit for hit in (string, regex) if hit is not None]
    if not candidates:
        return text, None
    start, length, matched = min(candidates, key=lambda hit: hit[:2])
    return text[: start - length if include else start], matched


def run(matcher, pieces):
    """Feed pieces until a stop: (shown, matched), checking that nothing comes after the stop."""
    shown = ""
    for piece in pieces:
        emit, stopped, matched = matcher.push(piece)
        shown += emit
        if stopped:
            assert matched is not None
            assert matcher.push("more") == ("", True, matched)
            return shown, matched
    emit, stopped, matched = matcher.flush()
    assert stopped == (matched is not None)
    return shown + emit, matched


LETTERS = st.text(alphabet="abc", max_size=40) | st.text(alphabet="abcé中 \n", max_size=40)
STRINGS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)
PATTERNS = [
    "ab+c",
    "a.?b|cc",
    "b$",
    r"\bca",
    "^c",
    r"b\S\s*",
    r"a[^b]",
    "(?:abc){2,}",
    r"c\Z|\Aba",
    r"\w\b",
    "c{,2}b",
    r"(?s)\n.|é",
]


@st.composite
def cut(draw, text):
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    return [text[start:end] for start, end in pairwise([0, *places, len(text)])]


@settings(deadline=None)
@given(st.data(), LETTERS, STRINGS, st.booleans())
def test_strings_as_a_search_of_the_whole_text(data, text, strings, include):
    found = run(StopMatcher(strings, include=include), data.draw(cut(text)))
    assert found == search(text, strings, (), include)


@pytest.mark.parametrize("window", [4, REGEX_WINDOW])
@settings(deadline=None)
@given(data=st.data(), text=LETTERS, strings=STRINGS, include=st.booleans())
def test_patterns_as_a_search_of_the_whole_text(window, data, text, strings, include):
    known = [pattern for pattern in PATTERNS if text.isascii() or r"\b" not in pattern]
    regexes = data.draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_module, "REGEX_WINDOW", window)
        found = run(StopMatcher(strings, regexes, include), data.draw(cut(text)))
    assert found == search(text, strings, regexes, include, window)


@settings(deadline=None)
@given(LETTERS, STRINGS)
@example("abcabx", ["abcabc", "bca"])
def test_only_what_may_be_a_stop_is_held_back(text, strings):
    matcher = StopMatcher(strings)
    shown = ""
    for place, char in enumerate(text):
        emit, stopped, _ = matcher.push(char)
        shown += emit
        if stopped:
            return
        held = text[len(shown) : place + 1]
        assert any(string.startswith(held) or held.startswith(string) for string in strings) or not held


def test_pieces_across_tokens():
    matcher = StopMatcher(["</answer>", "\n\n"])
    assert matcher.push("42</ans") == ("42", False, None)
    assert matcher.push("w") == ("", False, None)
    assert matcher.push("\n") == ("</answ", False, None)
    assert matcher.push("\nmore") == ("", True, "\n\n")


def test_longest_of_those_that_begin_together():
    matcher = StopMatcher(["stop", "stop!!"], include=True)
    assert matcher.push("x stop!") == ("x ", False, None)
    assert matcher.push("?") == ("stop", True, "stop")
    matcher = StopMatcher(["stop", "stop!!"])
    assert matcher.push("x stop") == ("x ", False, None)
    assert matcher.flush() == ("", True, "stop")


def test_a_pattern_holds_back_one_window_and_no_more():
    matcher = StopMatcher([], [r"END\d"])
    text = "x" * 1000
    emit, stopped, _ = matcher.push(text)
    assert (len(emit), stopped) == (1000 - REGEX_WINDOW + 1, False)
    assert matcher.push("END7 and more") == ("x" * (REGEX_WINDOW - 1), True, r"END\d")


def test_a_match_longer_than_the_window_is_not_found():
    inside, outside = REGEX_WINDOW - 2, REGEX_WINDOW - 1
    assert run(StopMatcher([], ["<x*>"]), ["<" + "x" * inside + ">"]) == ("", "<x*>")
    text = "<" + "x" * outside + ">"
    assert run(StopMatcher([], ["<x*>"]), [text]) == (text, None)


def test_what_takes_forever_elsewhere_does_not_here():
    """Under a backtracking search each further letter doubles the time of the first."""
    matcher = StopMatcher([], ["(a|aa)+b", "(a*)*b", "(?:a?){30}a{30}b"])
    for _ in range(20):
        assert not matcher.push("a" * 60)[1]


def test_a_pattern_that_takes_long_ends_its_own_text(monkeypatch):
    clock = iter(range(10**6))  # every look at it is a second
    monkeypatch.setattr(stop_module.time, "thread_time", lambda: next(clock))
    with pytest.raises(TextError, match="'ab' takes too long"):
        StopMatcher([], ["ab"]).push("xyz")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a{1000000000}", "too large: it repeats more than 1000 times"),
        ("((a{100}){100}){100}", "is no regular expression"),
        (r"(?:\w{50}){20}", "too large; shorten it"),
        (r"(?:[^\W\d]{30}){33}", "too large; shorten it"),
        ("a(?=b)", r"has \(\?=, but patterns are searched in linear time"),
        ("a(?!b)", "linear time"),
        ("(?<=a)b", "linear time"),
        ("(?<!a)b", "linear time"),
        ("(?>a)b", "linear time"),
        (r"(a)\1", r"has \\1, but patterns"),
        ("(?P<x>a)(?P=x)", "linear time"),
        (r"\bконец\b", "letters that are not ASCII"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_needs_more_than_linear_time_or_little_memory_is_refused(pattern, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TextError, match=words):
        StopMatcher([], [pattern])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("name", ["w", "D", *(pytest.param(name, marks=pytest.mark.slow) for name in "WdsS")])
def test_classes_are_those_of_python_for_every_character(name):
    """Of every script; but for what one of the two tables of Unicode does not know yet."""
    import re2

    old = unicodedata.ucd_3_2_0  # what both tables know, whatever their versions
    assigned = [chr(i) for i in range(0x110000) if old.category(chr(i)) not in ("Cn", "Cs")]
    for form in (rf"\{name}", rf"[\{name}]", rf"[^\{name}]"):
        ours, theirs = re2.compile(translated(form)), re.compile(form)
        wrong = [c for c in assigned if bool(ours.fullmatch(c.encode())) != bool(theirs.fullmatch(c))]
        assert len(wrong) <= len(assigned) * 1e-4, wrong[:20]


@pytest.mark.parametrize(
    "pattern",
    [
        "[]a]b",
        "[^]a]b",
        "[[]x",
        "[a[]x",
        "[a[^]x",
        "a{1,2",
        "[a{,3}]x",
        r"\[a\]",
        r"\u4e2d",
        r"[\u4e2d-\u4e30]",
        "x{,2}y",
        r"\\Z",
        r"[\s\S]b",
    ],
)
@given(text=st.text(alphabet="abxy[]^{,123}中\\Z \n", max_size=8))
def test_patterns_mean_what_they_mean_in_python(pattern, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = re.search(pattern, text)
    import re2

    found = re2.compile(translated(pattern)).search(text)
    assert (found and found.span()) == (expected and expected.span())


def test_an_included_pattern_holds_nothing_back():
    matcher = StopMatcher([], [r"\d+\."], include=True)
    assert matcher.push("at 12") == ("at 12", False, None)
    assert matcher.push("5. then") == ("5.", True, r"\d+\.")


def test_no_stops_pass_everything():
    assert run(StopMatcher([]), ["a", "", "bc"]) == ("abc", None)


@pytest.mark.parametrize(
    ("strings", "regexes", "message"),
    [
        ([""], [], "must be non-empty texts"),
        (["a", 3], [], "must be non-empty texts"),
        ("stop", [], "must come as lists"),
        ([], ["("], r"stop pattern '\(' is no regular expression"),
        ([], ["a*"], r"'a\*' matches the empty text"),
        ([], [3], "must be texts"),
    ],
)
def test_bad_stops(strings, regexes, message):
    with pytest.raises(TextError, match=message):
        StopMatcher(strings, regexes)
