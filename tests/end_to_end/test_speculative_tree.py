"""Trees of drafts: tokens are those without drafts, and nodes are what the drafter ranks highest, over no cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import speculative_requests
import torch
from drafted import causal, gated, norm, paired, write_head
from safetensors.torch import load_file
from small_configs import LATENT, QWEN3, VOCABULARY, WINDOWED
from speculative_requests import CONTEXT, LIKELY, assert_alike, requests, together
from test_speculative_draft import SMALL, TIGHT, Perturbed
from test_speculative_eagle3 import HEAD, TARGET, head_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import VERIFY
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels.step import draft_tree

LIMITS = {**speculative_requests.LIMITS, "max_tokens": 64}  # all rows at once, each with 15 nodes
WIDE, UNEVEN = [3, 2, 1], [[0], [0, 0], [1], [0, 0, 0], [2], [1, 0], [0, 1], [1, 0, 0], [0, 0, 0, 0]]


@pytest.fixture(scope="module", autouse=True)
def large_weights() -> Iterator[None]:
    """Weights of the usual size leave the logits so small that all tokens are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


def load(config: Mapping[str, Any], draft: DummyCheckpoint | None, tree: Any = None, **options: Any) -> LLM:
    checkpoint: Any = DummyCheckpoint(dict(config))
    if draft is not None:
        checkpoint = PairedCheckpoint(checkpoint, draft)
        options |= {"speculative": {"method": "draft", "tree": tree}}
    return LLM(checkpoint, compile_plan(checkpoint, **LIMITS, **options))


def alone(llm: LLM) -> list[Output]:
    return [llm.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]


@pytest.fixture(scope="module")
def plain(large_weights: None) -> list[Output]:
    return alone(load(QWEN3, None))


@pytest.mark.parametrize(("page_size", "tree"), [(1, UNEVEN), (7, WIDE), (64, [2, 2])])
def test_tokens_are_those_without_drafts(plain: list[Output], page_size: int, tree: Any) -> None:
    """Through cut prompts, retractions and prefix hits, for any way of sampling."""
    llm = load(QWEN3, Perturbed(dict(QWEN3)), tree, page_size=page_size)
    found, retractions, cached = Counter[tuple[int, int]](), 0, 0
    row = -(-CONTEXT // page_size)
    for overlap, chunk, pages in ((True, None, None), (True, 5, 1 + 2 * row), (False, 11, 1 + 2 * row)):
        made, accepted = together(
            llm, pages, overlap=overlap, chunked_prefill_size=chunk, **(TIGHT if pages else {})
        )
        assert_alike(made, plain)
        found += accepted
        retractions += sum(output.meta_info["num_retractions"] for output in made)
        cached += sum(output.meta_info["cached_tokens"] for output in made)
    paths = Speculative(tree=tree).tree
    deep = max(map(len, paths))
    assert {right for right, _ in found} == set(range(deep + 1))
    assert {drafted for _, drafted in found} >= {0, 1, len(paths)}, "rows that end have fewer places"
    assert page_size == 64 or (retractions and cached)


@pytest.mark.parametrize("tree", [WIDE, UNEVEN])
def test_the_model_itself_is_always_right(plain: list[Output], tree: Any) -> None:
    """So the drafter's cache, its places and what each node sees are right, wherever the branch of the step before
    lay.
    """
    llm = load(QWEN3, DummyCheckpoint(dict(QWEN3)), tree, page_size=4)
    made, found = together(llm, 1 + 2 * CONTEXT // 4, chunked_prefill_size=9, **TIGHT)
    assert_alike(made, plain)
    paths = Speculative(tree=tree).tree
    most = {nodes: max(itertools.accumulate(itertools.takewhile(bool, map(len, paths[:nodes])), max), default=0)
            for nodes in range(len(paths) + 1)}  # fmt: skip
    short = sum(times for (right, drafted), times in found.items() if right < most[drafted])
    # Where the first children go on, so does the tree; near ties aside.
    assert short <= 2, found
    assert sum(output.meta_info["num_retractions"] for output in made)


def test_second_children_come_true(plain: list[Output]) -> None:
    """A tree gains more than the chain of its first children, by a drafter that is often nearly right."""
    gains = []
    for tree in ([1, 1], [4, 2]):
        made, found = together(load(QWEN3, Perturbed(dict(QWEN3)), tree, page_size=8))
        assert_alike(made, plain)
        gains.append(sum(right * times for (right, _), times in found.items()) / sum(found.values()))
    assert gains[1] > gains[0] + 0.1


@pytest.mark.parametrize(
    ("config", "draft", "options"),
    [
        (WINDOWED, WINDOWED, {}),
        (QWEN3, SMALL, {"kv_dtype": "bfloat16"}),
        (QWEN3, QWEN3, {"quant": "fp8"}),
    ],
    ids=["windows", "another", "quantized"],
)
def test_other_caches_and_weights(config: dict[str, Any], draft: dict[str, Any], options: Any) -> None:
    expected = alone(load(config, None, page_size=4, **options))
    made, found = together(load(config, DummyCheckpoint(dict(draft)), [2, 2, 1], page_size=4, **options))
    if "kv_dtype" not in options:  # rounded entries, in sums of another order
        assert_alike(made, expected)
    else:
        same = sum(a.token_ids == b.token_ids for a, b in zip(made, expected, strict=True))
        assert same >= len(made) - 2
    if config is draft:
        assert sum(right * n for (right, _), n in found.items()) > 50


@contextmanager
def trees() -> Iterator[list[tuple[int, int, list[int]]]]:
    """Slot, place of the root, and tokens of all nodes, of every row that executables run which are loaded within."""
    op: Any = draft_tree.pack_tree
    reference, seen = op.reference, list[tuple[int, int, list[int]]]()

    def heard(*operands: torch.Tensor, deep: int) -> Any:
        made = reference(*operands, deep=deep)
        first, count = made[-3].tolist(), made[-2].tolist()
        for slot, start, at, n in zip(operands[1].tolist(), operands[5].tolist(), first, count, strict=True):
            seen.extend([(slot, start, made[0][at : at + n].tolist())] if n > 1 else [])
        return made

    object.__setattr__(op, "reference", heard)
    try:
        yield seen
    finally:
        object.__setattr__(op, "reference", reference)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TARGET, initializer_range=0.25)).eval()
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def ranked(
    model: LlamaForCausalLM, head: Mapping[str, torch.Tensor], known: list[int], branch: Sequence[int]
) -> list[int]:
    """Tokens by the biased logits of an EAGLE-3 head behind ``branch``, its layer over all of that for every node."""
    states = model(torch.tensor([known[:-1]]), output_hidden_states=True).hidden_states
    h = torch.cat([states[place][0] for place in (2, 3, 4)], -1) @ head["fc.weight"].T
    table, tokens = model.get_input_embeddings().weight, known[1:]
    for token in (*branch, None):
        e = norm(table[tokens], head["midlayer.input_layernorm.weight"])
        both = torch.cat((e, norm(h, head["midlayer.hidden_norm.weight"])), -1)
        y = h + causal(both, lambda n: head[f"midlayer.self_attn.{n}.weight"], heads=4, kv_heads=4, theta=1e4)
        z = norm(y, head["midlayer.post_attention_layernorm.weight"])
        y = y + gated(z, lambda n: head[f"midlayer.mlp.{n}.weight"])
        if token is None:
            token_of = torch.arange(len(head["d2t"])) + head["d2t"]
            logits = norm(y[-1], head["norm.weight"]) @ head["lm_head.weight"].T
            logits += sum(bias * (token_of == token) for token, bias in LIKELY["logit_bias"].items())
            return token_of[logits.argsort(descending=True)].tolist()
        h, tokens = torch.cat((h, y[-1:])), [*tokens, token]
    raise AssertionError


def test_nodes_are_those_of_the_head_over_the_whole_sequence(
    target: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    """Also where the entries before are those of branches that were right: one of three likely tokens always is."""
    folder, model = target
    head = write_head(tmp_path / "head", HEAD, head_tensors(HEAD))
    both, weights = paired(folder, head), load_file(head / "model.safetensors")
    plan = compile_plan(both, **LIMITS, page_size=4, speculative={"method": "eagle3", "tree": UNEVEN})
    prompts = [[3], [5, 7, 9, 11], [(i * i) % VOCABULARY for i in range(29)]]
    paths = Speculative(tree=UNEVEN).tree  # pyright: ignore[reportArgumentType]
    numbers = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
    with trees() as seen:
        llm = LLM(both, plan, scheduler=SchedulerOptions(speculation="always", chunked_prefill_size=7))
        for prompt in (*prompts, prompts[-1]):  # the last finds its prefix
            seen.clear()
            params = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True, **LIKELY)
            (output,) = llm.generate(token_ids=[prompt], sampling=params)
            sequence = [*prompt, *output.token_ids]
            assert len(seen) > 5
            assert output.meta_info["spec_accept_length"] > 1.9
            for _, place, nodes in seen[1::2]:
                known = sequence[: place + 1]
                for path in paths[: len(nodes) - 1]:
                    branch = [nodes[numbers[path[:d]]] for d in range(1, len(path))]
                    wanted = ranked(model, weights, known, branch)[path[-1]]
                    assert nodes[numbers[path]] == wanted, (place, path)
    assert output.meta_info["cached_tokens"] == 28


@pytest.mark.parametrize("method", ["eagle3", "eagle"])
def test_heads(target: tuple[Path, LlamaForCausalLM], tmp_path: Path, method: str) -> None:
    """Hidden states and entries one place before their tokens come to where the next step looks for them."""
    folder, _ = target
    if method == "eagle3":
        both: Any = paired(folder, write_head(tmp_path / "head", HEAD, head_tensors(HEAD)))
    else:
        config = {k: v for k, v in HEAD.items() if k != "draft_vocab_size"}
        both = PairedCheckpoint(
            open_checkpoint(folder), DummyCheckpoint({**config, "architectures": ["LlamaForCausalLMEagle"]})
        )
    expected = alone(LLM(open_checkpoint(folder), compile_plan(folder, **LIMITS, page_size=4)))
    llm = LLM(both, compile_plan(both, **LIMITS, page_size=4, speculative={"method": method, "tree": WIDE}))
    made, found = together(llm, 49, chunked_prefill_size=9, new_token_ratio=0.0, min_new_token_ratio=0.0)
    assert_alike(made, expected)
    assert {right for right, _ in found} >= ({0, 1, 2, 3} if method == "eagle3" else {0, 1})


def test_a_plan_remembers_its_tree(tmp_path: Path) -> None:
    checkpoint = PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), DummyCheckpoint(dict(QWEN3)))
    plan = compile_plan(checkpoint, **LIMITS, speculative={"method": "draft", "tree": [2, 1]})
    read = artifact.load(plan.save(tmp_path))
    assert read.digest == plan.digest
    assert read.options.speculative.tree == ((0,), (0, 0), (1,), (1, 0))
    assert (read.steps[VERIFY].each, read.steps[VERIFY].gain, read.limits.mask_places) == (5, 3, 1)
    listed = compile_plan(
        checkpoint, **LIMITS, speculative={"method": "draft", "tree": [[0], [0, 0], [1], [1, 0]]}
    )
    assert listed.digest == plan.digest


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tree": [[1]]}, {}, r"has \[1\] twice, or before its parent or its elder sibling"),
    ({"tree": [[0, 0], [0]]}, {}, r"has \[0, 0\] twice, or before its parent"),
    ({"tree": [[0], [0]]}, {}, r"has \[0\] twice"),
    ({"tree": [2, 0]}, {}, r"must be a list of how many children"),
    ({"tree": "[2]"}, {}, r"must be a list of how many children"),
    ({"tree": [3, 3, 3, 3]}, {}, r"has \d+ nodes, and steps check 63 at most"),
    (
        {"tree": [7, 7]},
        {"max_tokens": 40},
        r"the 56 nodes of speculative\.tree and the token before them do not fit into steps of ",
    ),
    (
        {"tree": [2]},
        {"deterministic": True},
        r"attends by kernels of its own, and in a plan\.deterministic plan",
    ),
    (
        {"tree": [2]},
        {"kv_dtype": "int8_per_token_head"},
        r"the cache has layers\.0\.scales, too \(latents, or numbers",
    ),
    (
        {"tree": [2], "forced_acceptance": 0.5},
        {},
        r"forced_acceptance is of chains; leave speculative\.tree out",
    ),
    (
        {"tree": [1] * 12},
        {"model": WINDOWED},
        r"is 12 levels deep, and .* window.* of 11 tokens; make it less deep",
    ),
    (
        {"tree": [2]},
        {"model": LATENT},
        r"the cache has layers\.0\.\w+, too \(latents, or numbers with scales\)",
    ),
    (
        {"tree": [2], "method": "ngram"},
        {"draft": None},
        r"speculative\.tree=.* is of no use to ngram; leave it out",
    ),
    (
        {"tree": [2], "num_draft_tokens": 2},
        {},
        r"num_draft_tokens is of chains, and there is a speculative\.tree",
    ),
    ({"tree": [2], "method": None}, {"draft": None}, r"speculative\.tree=.* is of no use without a method"),
]


@pytest.mark.parametrize(("speculative", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    speculative: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model, draft = options.get("model", QWEN3), options.get("draft", QWEN3)
    checkpoint: Any = DummyCheckpoint(dict(model))
    if draft is not None:
        checkpoint = PairedCheckpoint(checkpoint, DummyCheckpoint(dict(draft)))
    others = {name: value for name, value in options.items() if name not in ("model", "draft")}
    with pytest.raises(PlanError, match=message):
        compile_plan(checkpoint, **{**LIMITS, **others}, speculative={"method": "draft", **speculative})
