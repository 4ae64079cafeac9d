"""A policy from outside the packages, by registration alone."""

from __future__ import annotations

import pytest

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.engine.ranking import RANKINGS, ranking
from makeready.graphs.checkpoint.dummy import DummyCheckpoint

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def test_the_shortest_prompt_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"there is no scheduler\.policy='toy-shortest'"):
        SchedulerOptions(policy="toy-shortest")
    monkeypatch.setitem(RANKINGS, "toy-shortest", None)  # type: ignore[arg-type]  # goes with the test
    ranking("toy-shortest")(lambda options: lambda sequence: len(sequence.prompt))
    llm = LLM(
        DummyCheckpoint(dict(CONFIG)),
        scheduler=SchedulerOptions(policy="toy-shortest"),
        max_rows=1,
        max_tokens=16,
        context_len=32,
    )
    lengths, order = (9, 4, 12, 2, 7), []
    finish = llm.engine.scheduler.retire

    def retire(sequence) -> None:
        order.append(len(sequence.prompt))
        finish(sequence)

    monkeypatch.setattr(llm.engine.scheduler, "retire", retire)
    prompts = [list(range(1, 1 + length)) for length in lengths]
    llm.generate(token_ids=prompts, sampling=SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert order == sorted(lengths)
