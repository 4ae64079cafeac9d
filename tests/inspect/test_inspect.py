"""What inspection says of a plan, against arithmetic of its own."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.compile import compile_plan
from makeready.graphs.inspect.analysis import cost_analysis, launch_costs, memory_analysis
from makeready.graphs.inspect.html import plan_html
from makeready.graphs.inspect.padding import padding_waste
from makeready.graphs.inspect.text import plan_text
from makeready.graphs.plan import Plan
from makeready.graphs.spec import DECODE, EXTEND, Bucket

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, DIM, VOCABULARY = 3, 48, 80, 6, 2, 8, 67
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
ROWS, TOKENS, PAGE = 4, 24, 8


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = open_checkpoint("dummy", config=CONFIG)
    return compile_plan(
        checkpoint,
        max_rows=ROWS,
        max_tokens=TOKENS,
        page_size=PAGE,
        max_decode_buckets=2,
        max_extend_buckets=6,
    )


def matrix_elements() -> int:
    per_layer = HIDDEN * DIM * (HEADS + 2 * KV_HEADS) + HIDDEN * DIM * HEADS + 3 * HIDDEN * MLP
    return LAYERS * per_layer + VOCABULARY * HIDDEN


def vector_elements() -> int:
    return LAYERS * (2 * HIDDEN + 2 * DIM) + HIDDEN


def test_memory_is_the_models_arithmetic(plan: Plan) -> None:
    memory = memory_analysis(plan)
    assert memory["parameters"] == matrix_elements() + vector_elements()
    assert memory["stored_twice"] == 2 * VOCABULARY * HIDDEN  # the tied head is packed, the embedding is not
    assert memory["generated"] == 4 * 64 * DIM  # rotary rows, fp32
    by_dtype = memory["weights_by_dtype"]
    assert by_dtype["bfloat16"] == 2 * (matrix_elements() + VOCABULARY * HIDDEN)
    assert by_dtype["float32"] == 4 * vector_elements() + memory["generated"]
    page = LAYERS * 2 * KV_HEADS * DIM * PAGE * 4
    assert memory["kv"]["page_bytes"] == page
    assert memory["kv"]["full_bytes"] == (ROWS * 64 // PAGE + 1) * page
    tokens = memory["capacity"][1]["tokens"]
    assert (tokens // PAGE + 1) * page <= 2**30 - memory["fixed"] < (tokens // PAGE + 2) * page


def test_linear_costs_are_two_operations_a_weight(plan: Plan) -> None:
    for bucket in plan.buckets:
        costs = [c for c in launch_costs(plan, bucket, context=16) if c.op == "linear"]
        last = bucket.rows  # the head, and the last layer behind its attention, see one token a row
        per_token = (LAYERS - 1) * (matrix_elements() - VOCABULARY * HIDDEN) // LAYERS
        per_token += HIDDEN * DIM * (HEADS + 2 * KV_HEADS)
        per_row = HIDDEN * DIM * HEADS + 3 * HIDDEN * MLP + VOCABULARY * HIDDEN
        assert math.fsum(c.flops for c in costs) == 2 * (bucket.tokens * per_token + last * per_row)


def test_step_costs_add_up_and_grow_with_the_bucket(plan: Plan) -> None:
    costs = cost_analysis(plan, context=16)
    for bucket, cost in costs.items():
        assert cost["seconds"] == pytest.approx(sum(c.seconds for c in launch_costs(plan, bucket, 16)))
        for other, less in costs.items():
            if other.phase == bucket.phase and bucket.covers(other.rows, other.tokens):
                assert less["nbytes"] <= cost["nbytes"]
                assert less["flops"] <= cost["flops"]


def test_padding_is_what_every_legal_batch_wastes(plan: Plan) -> None:
    """By brute force: each batch goes to the covering bucket with the fewest tokens, then rows."""
    batches: dict[Bucket, list[tuple[int, int]]] = {b: [] for b in plan.buckets}
    for phase in (DECODE, EXTEND):
        for rows in range(1, ROWS + 1):
            for tokens in [rows] if phase == DECODE else range(rows, TOKENS + 1):
                fits = [b for b in plan.buckets if b.phase == phase and b.rows >= rows and b.tokens >= tokens]
                batches[min(fits, key=lambda b: (b.tokens, b.rows))].append((rows, tokens))
    waste = padding_waste(plan)
    assert set(waste) == set(plan.buckets)
    for bucket, mine in batches.items():
        found = waste[bucket]
        assert found.batches == len(mine)
        if mine:
            assert found.tokens == (min(t for _, t in mine), max(t for _, t in mine))
            worst = 1 - min(t for _, t in mine) / bucket.tokens
            assert found.token.worst == pytest.approx(worst)
            assert 0 <= found.token.expected <= found.token.worst
    for phase in (DECODE, EXTEND):
        assert math.fsum(w.weight for b, w in waste.items() if b.phase == phase) == pytest.approx(1)


def test_text_says_what_a_reader_asks(plan: Plan) -> None:
    text = plan_text(plan)
    assert all(len(line) <= 110 for line in text.splitlines())
    assert plan.digest in text
    assert f"{ROWS} rows, {TOKENS} tokens a step, context 64" in text
    for bucket in plan.buckets:
        assert str(bucket) in text
    for launch in plan.programs[DECODE].launches:
        assert f"{launch.op}/{launch.kernel}" in text
    assert plan.as_text() == text


class Reader(HTMLParser):
    """Collects tags, and everything that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img", "input", "hr", "col"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_by_itself(plan: Plan) -> None:
    page = plan_html(plan)
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    text = "".join(reader.text)
    for phase, program in plan.programs.items():
        assert phase in text
        for launch in program.launches:
            assert launch.op in text
    for bucket in plan.buckets:
        assert str(bucket) in text


def test_page_escapes_what_the_checkpoint_says() -> None:
    name = "<script>alert(1)</script>"
    checkpoint = open_checkpoint(
        "dummy", config={**CONFIG, "architectures": ["Qwen3ForCausalLM"], "note": name}
    )
    assert name not in plan_html(compile_plan(checkpoint, max_rows=2, max_tokens=8))
