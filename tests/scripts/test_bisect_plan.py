"""bisect_plan.py on plans for the CPU, sound and with a wrong kernel."""

from __future__ import annotations

import pytest
from scripts_in_process import TINY, script

from makeready.kernels import registry
from makeready.scripts import main

PLAN = ["plan.context_len=32", "plan.max_rows=2", "plan.max_tokens=16", "plan.weight_dtype=float32"]
RUN = [*TINY, "token_ids=[5,6,7]", "tokens=3"]


@pytest.fixture
def plan(tmp_path, capsys):
    folder = tmp_path / "plan"
    assert script("compile")(*TINY, *PLAN, f"output={folder}") == 0
    capsys.readouterr()
    return folder


def test_a_sound_plan_and_a_wrong_kernel(plan, capsys, monkeypatch):
    assert script("bisect_plan")(*RUN, f"plan={plan}", "rows=2") == 0
    assert "no launch differs: " in capsys.readouterr().out

    found = registry.find

    def find(op, name, target):
        kernel = found(op, name, target)
        if op != "silu_mul" or name == registry.REFERENCE:
            return kernel
        return registry.Kernel(
            op, name, target, lambda *operands, **attrs: kernel.run(*operands, **attrs) * 1.1
        )

    monkeypatch.setattr(registry, "find", find)
    assert script("bisect_plan")(*RUN, f"plan={plan}") == 1
    said = capsys.readouterr()
    assert "step 1 (extend-" in said.out
    assert ": silu_mul, layer 0" in said.out
    assert "result y is off by 0.1, 1e-05 is allowed" in said.out
    assert "computes something else on this machine than its interpreter" in said.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["tokens=3"], "nothing to run; give one of prompt=TEXT and token_ids"),
        (["prompt=a", "token_ids=[1]"], "prompt= and token_ids= were given together"),
        (["token_ids=[1]", "rows=0"], "rows=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be(options, sentence, capsys):
    assert script("bisect_plan")(*TINY, "plan=nowhere", *options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["prompt=a"], "has no tokenizer; give token_ids=[ID,ID] instead of prompt="),
        (["token_ids=[97]"], "leave the vocabulary, which ends at 96"),
        (["token_ids=[1]", "tokens=40"], "1 tokens and 40 more exceed the plan's context of 32"),
        (["token_ids=[1]", "rows=3"], "rows go from 1 to 2"),
    ],
)
def test_what_the_plan_does_not_hold(options, sentence, plan, capsys):
    assert script("bisect_plan")(*TINY, f"plan={plan}", *options) == 1
    assert sentence in capsys.readouterr().err


def test_it_is_a_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/makeready"])
    with pytest.raises(SystemExit, match="0"):
        main.main(["bisect", "--help"])
    said = capsys.readouterr().out
    assert "makeready bisect plan=plans/x" in said
    for option in ("token_ids", "tokens", "rows", "prompt"):
        assert option in said
