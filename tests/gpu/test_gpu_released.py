"""What a model held is free when it is left, and when the process that leads its own is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if "PYTEST_XDIST_WORKER" in os.environ:
    pytest.skip("takes all memory of the GPU: run it alone", allow_module_level=True)

from scripted_steps import SMALL, write_checkpoint

from makeready.graphs.plan import artifact
from makeready.graphs.plan.targets import TARGETS
from makeready.graphs.planner.compile import compile_plan

LIMITS = {
    "max_rows": 8,
    "max_tokens": 256,
    "context_len": 256,
    "max_decode_buckets": 3,
    "max_extend_buckets": 3,
}
PATIENCE = 60.0

# No torch here, which would hold memory of its own. Free memory is read in a context that stays.
IN_TURN = """
import json, sys
from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.executable.cuda.driver import Driver
driver = Driver()
driver.initialise()
device = driver.open(0)
free, pages = [driver.memory()[0]], []
for turn in range(10):
    checkpoint, plan = json.loads(sys.argv[1])[turn % 2]
    with LLM(checkpoint, plan) as llm:
        pages.append(llm.engine.executable.pages)
        llm.generate(token_ids=[[1, 2, 3]], sampling=SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert driver.memory()[0] < free[0] // 2
    driver.use(device)
    free.append(driver.memory()[0])
print(json.dumps({"free": free, "pages": pages}))
"""
LOADED = """
import sys, time
from makeready.engine.llm import LLM
llm = LLM(sys.argv[1], sys.argv[2])
print("loaded", flush=True)
time.sleep(600)
"""
LEADER = """
import sys, time
from makeready.graphs import children
child = children.start([sys.executable, "-c", *sys.argv[1:]])
time.sleep(600)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Two small models and their plans."""
    major, minor = torch.cuda.get_device_capability()
    target = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if target is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    made = []
    for name, layers in (("one", 2), ("other", 3)):
        folder = tmp_path_factory.mktemp(name)
        checkpoint = write_checkpoint(folder / "checkpoint", {**SMALL, "num_hidden_layers": layers})
        plan = compile_plan(checkpoint, target=target, **LIMITS)
        made.append((str(checkpoint.path), str(artifact.save(plan, folder / "plan"))))
    return made


def test_ten_models_in_turn_leave_every_byte(models: list[tuple[str, str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(models)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The driver keeps a little of its own from the first load on.
    assert found["free"][0] - found["free"][1] < 64 * 2**20
    assert len(set(found["free"][1:])) == 1, found["free"]
    assert len(set(found["pages"][2::2])) == len(set(found["pages"][3::2])) == 1, found["pages"]


def test_the_gpu_is_free_when_the_leader_is_killed(models: list[tuple[str, str]]) -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, LOADED, *models[0]], stdout=subprocess.PIPE, text=True
    )
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "loaded\n"
        assert torch.cuda.mem_get_info()[0] < before // 2
        leader.kill()
        began = time.monotonic()
        while torch.cuda.mem_get_info()[0] < before - 2**28:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.02)
        print(f"free after {time.monotonic() - began:.2f} s")
    finally:
        leader.kill()
        leader.communicate()
