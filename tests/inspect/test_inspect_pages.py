"""Text and page: they say what the plan says, stand alone, and let no name out of its quotes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from inspect_plans import ROWS, make_plan, tiny

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import memory_analysis
from makeready.graphs.inspect.arena_view import live_bytes
from makeready.graphs.inspect.html import plan_html
from makeready.graphs.inspect.markup import Markup, tag
from makeready.graphs.inspect.padding import padding
from makeready.graphs.inspect.text import plan_text
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Lane

VOID = {"meta"}


class Page(HTMLParser):
    """Elements with their attributes and the text in them; fails on tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def tips(self) -> list[str]:
        return [a["data-tip"] for _, a in self.elements if a.get("data-tip")]


@cache
def page() -> Page:
    return Page(plan_html(tiny()))


@cache
def unfused() -> Plan:
    return make_plan(disabled_passes=tuple(REWRITES))


def renamed(plan: Plan, old: str, new: str) -> Plan:
    """The plan with another name for a weight."""

    def names(mapping):
        return {k: new if v == old else v for k, v in mapping.items()}

    programs = {
        phase: replace(p, launches=tuple(replace(x, operands=names(x.operands)) for x in p.launches))
        for phase, p in plan.programs.items()
    }
    weights = tuple(
        replace(w, param=replace(w.param, name=new)) if w.param.name == old else w for w in plan.weights
    )
    return replace(plan, programs=programs, weights=weights)


@pytest.mark.parametrize("make", [tiny, unfused])
def test_text_is_narrow_and_names_everything(make):
    plan = make()
    text = plan_text(plan, context=40)
    assert max(len(line) for line in text.splitlines()) <= 110
    words = set(text.replace(",", " ").split())
    for phase in plan.programs:
        for launch in plan.programs[phase].launches:
            assert f"{launch.op}/{launch.kernel}" in words
    assert {str(b) for b in plan.buckets} <= words
    assert {plan.digest, plan.checkpoint, plan.architecture} <= words
    assert plan.as_text() == plan_text(plan)
    (off,) = (line for line in text.splitlines() if line.startswith("passes off"))
    assert off.split()[2:] == (list(plan.options.disabled_passes and REWRITES) or ["none"])


def test_measured_choices_are_told():
    assert "tuned" not in {line.split(" ")[0] for line in plan_text(tiny(), context=40).splitlines()}
    tuned = replace(tiny(), tuned={"Some GPU": {"decode/0/decode-1": "other", "decode/1/decode-1": "other"}})
    assert "tuned        2 choices changed on Some GPU" in plan_text(tuned, context=40).splitlines()


def test_launches_of_the_side_lane_are_told_and_dashed():
    """As a plan for a GPU would say it of three launches of a layer in the middle."""
    plan = tiny()
    decode = plan.programs["decode"]
    first = next(at for at, launch in enumerate(decode.launches) if "layers.1." in str(launch.operands)) + 3
    lane = Lane(first - 3, first, first + 3)
    plan = replace(plan, programs={**plan.programs, "decode": replace(decode, lanes=(lane,))})
    said = plan_text(plan)
    assert f"decode {len(decode.launches)} (3 beside others)" in said
    assert f"  {first} to {first + 2} run beside {first - 2} to {first - 1}\n" in said
    dashed = [a for _, a in Page(plan_html(plan)).elements if a.get("class") == "box side"]
    assert len(dashed) == 3
    assert not [a for _, a in page().elements if a.get("class") == "box side"]


def test_the_page_names_every_launch_bucket_and_weight_shape():
    plan, texts = tiny(), set(page().texts)
    for phase in plan.programs:
        assert {launch.op for launch in plan.programs[phase].launches} <= texts
        assert {launch.kernel for launch in plan.programs[phase].launches} <= texts
    assert {str(b) for b in plan.buckets} <= texts
    assert plan.digest in texts


@pytest.mark.parametrize("make", [tiny, unfused])
def test_the_page_stands_alone(make):
    source = plan_html(make())
    for name, attributes in Page(source).elements:
        assert name not in ("link", "img", "iframe", "object", "base", "image", "use")
        assert not {"src", "xlink:href", "action", "background"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", source)


def test_the_same_plan_gives_the_same_page():
    assert plan_html(tiny()) == plan_html(make_plan(max_decode_buckets=3, max_extend_buckets=9))


def test_coordinates_are_numbers():
    for name, attributes in page().elements:
        for key in ("x", "y", "width", "height", "cx", "cy", "r", "x1", "x2", "y1", "y2"):
            if key in attributes:
                value = float(attributes[key] or "nan")
                assert abs(value) < 10_000, (name, attributes)
                assert value >= 0 or key not in ("width", "height", "r")
        assert not re.search(r"nan|inf\b", attributes.get("d") or "")


def test_every_buffer_is_drawn_where_it_lives():
    plan = tiny()
    tips = Counter(t for t in page().tips() if "\nalive\t" in t)
    for phase in plan.programs:
        program = plan.programs[phase]
        for name, buffer in program.buffers.items():
            if buffer.row_stride is not None:
                continue
            alive = f"alive\tlaunch {buffer.first} ({program.launches[buffer.first].op}) to {buffer.last} "
            assert any(
                t.startswith(f"{name}\n") and f"offset\t{buffer.offset:,} to" in t and alive in t
                for t in tips
            )


def test_live_bytes_by_counting():
    plan = unfused()
    for phase in plan.programs:
        program = plan.programs[phase]
        sizes = max((b for b in plan.buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows)).sizes
        last = {v: at for at, x in enumerate(program.launches) for v in x.operands.values()}
        first = {v: at for at, x in enumerate(program.launches) for v in x.results.values()}
        for at, found in enumerate(live_bytes(plan, phase)):
            names = [v for v in first if v in program.buffers and first[v] <= at <= last.get(v, first[v])]
            assert found == sum(program.buffers[v].spec.nbytes(sizes) for v in names)


def test_one_pane_of_each_group_is_shown_and_its_button_pressed():
    groups: dict[str, list[str]] = {}
    pressed: dict[str, list[str]] = {}
    keys: dict[str, set[str]] = {}
    for name, a in page().elements:
        if a.get("class") == "pane" and "hidden" not in a:
            groups.setdefault(a["data-group"], []).append(a["data-key"])
        if name == "button":
            keys.setdefault(a["data-group"], set()).add(a["data-key"])
            if a["aria-pressed"] == "true":
                pressed.setdefault(a["data-group"], []).append(a["data-key"])
    assert {g: set(k) for g, k in groups.items()} == {g: set(k) for g, k in pressed.items()}
    assert all(len(set(k)) == 1 for k in groups.values())
    assert set(groups) == set(keys) == {"phase", "segment-decode", "segment-extend"}
    assert keys["phase"] == set(tiny().programs)


def test_a_third_phase_is_shown_as_well():
    plan = make_plan(max_logprob_tokens=11)
    assert memory_analysis(plan)["arena_by_phase"].keys() == {"decode", "extend", "input_logprobs"}
    mine, waste = [b for b in plan.buckets if b.phase == "input_logprobs"], padding(plan)
    assert sum(waste.buckets[b].batches for b in mine) == sum(11 - rows + 1 for rows in range(1, ROWS + 1))
    assert waste.phases["input_logprobs"].tokens == (1, 11)
    text = plan_text(plan, context=40)
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "all input_logprobs" in text
    assert f"Kernels of input_logprobs-{ROWS}x11" in text
    parsed = Page(plan_html(plan))
    keys = {a["data-key"] for n, a in parsed.elements if n == "button" and a["data-group"] == "phase"}
    assert keys == set(plan.programs) == {"decode", "extend", "input_logprobs"}
    assert {str(b) for b in mine} <= set(parsed.texts)
    maps = {a["aria-label"] for n, a in parsed.elements if n == "svg" and "which" in (a["aria-label"] or "")}
    assert maps == {f"which {phase} bucket runs which batch" for phase in ("extend", "input_logprobs")}


def test_names_stay_text():
    hostile = "</script><img src=x onerror=\"alert('1')\">&amp;"
    plan = renamed(replace(tiny(), architecture=hostile), "norm.weight", f"{hostile}.weight")
    parsed = Page(plan_html(plan))
    assert "img" not in {name for name, _ in parsed.elements}
    assert Counter(n for n, _ in parsed.elements) == Counter(n for n, _ in page().elements)
    assert hostile in parsed.texts
    assert f"{hostile}.weight" in parsed.texts
    assert any(f"{hostile}.weight" in t for t in parsed.tips())


def test_tag_escapes_what_is_not_markup():
    made = tag("p", "a<b", Markup("<i/>"), title='"&', hidden=True, id=None, data_x=1.25)
    assert made == '<p title="&quot;&amp;" hidden data-x="1.2">a&lt;b<i/></p>'


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (units.nbytes(0), "0 B"), (units.nbytes(1023), "1,023 B"), (units.nbytes(1024), "1.00 KiB"),
        (units.nbytes(10 * 2**20), "10.0 MiB"), (units.nbytes(2**50), "1,024 TiB"),
        (units.count(9_999), "9,999"), (units.count(134_515_008), "135 M"), (units.count(8.19e9), "8.19 G"),
        (units.flops(999), "999 FLOP"), (units.flops(143e9), "143 GFLOP"), (units.rate(3e12, "B"), "3.00 TB/s"),
        (units.seconds(1.5), "1.50 s"), (units.seconds(0.9999), "1.00 s"), (units.seconds(15e-6), "15.0 µs"),
        (units.seconds(3e-9), "3.00 ns"), (units.percent(0.125), "12.5 %"), (units.percent(None), "–"),
        (units.dtype("bfloat16"), "bf16"), (units.dtype("float8_e4m3fn"), "f8_e4m3fn"), (units.dtype("uint8"), "u8"),
        (units.ranges([0, 2, 3, 4, 9]), "0, 2–4, 9"), (units.ranges([]), ""), (units.span(3, 1200), "3–1,200"),
    ],
)  # fmt: skip
def test_units(shown, wanted):
    assert shown == wanted
