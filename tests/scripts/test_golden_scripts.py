"""compile.py golden=true predicts tokens beside a plan, and generate.py golden=true holds the model to them."""

from __future__ import annotations

import json

from scripts_in_process import TINY, script

PLAN = ["plan.context_len=32", "plan.max_rows=2", "plan.max_tokens=16", "plan.weight_dtype=float32"]


def test_predicted_tokens_are_checked_before_anything_else(tmp_path, capsys):
    folder, rows, out = tmp_path / "plan", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"token_ids": [1, 2, 3], "max_new_tokens": 3}) + "\n")
    assert script("compile")(*TINY, *PLAN, f"output={folder}", "golden=true") == 0
    assert "8 tokens, " in capsys.readouterr().out
    assert len(json.loads((folder / "golden.json").read_text())["steps"]) == 8
    run = [*TINY, f"plan={folder}", f"prompts={rows}", f"output={out}", "golden=true"]
    assert script("generate")(*run) == 0
    assert "as predicted: 8 tokens" in capsys.readouterr().err

    made = json.loads((folder / "golden.json").read_text())
    made["steps"][3]["token"] = (made["steps"][3]["token"] + 1) % 97
    (folder / "golden.json").write_text(json.dumps(made))
    assert script("generate")(*run, "overwrite=true") == 1
    assert "the golden check failed at token 4 of 8" in capsys.readouterr().err

    assert script("compile")(*TINY, *PLAN, f"output={folder}") == 0  # a new plan has no old prediction
    assert script("generate")(*run, "overwrite=true") == 1
    assert "holds no golden.json; compile the plan with golden=true" in capsys.readouterr().err


def test_a_check_needs_a_plan_and_one_engine(capsys):
    assert script("generate")(*TINY, "prompt=a", "golden=true") == 2
    assert "golden=true checks one engine" in capsys.readouterr().err
