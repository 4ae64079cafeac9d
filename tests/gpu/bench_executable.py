"""Loading and stepping: what the host and the copies cost beside the kernels.

python tests/gpu/bench_executable.py [LAYERS [PLAN_FOLDER [RESULT_JSON]]]   (COMMIT names the code's commit)

Loads a model of Qwen3-8B's shapes with LAYERS layers (12, 7 GB; 36 is the real one) in a process without
torch, from safetensors in the page cache and from dummy weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scripted_steps import write_checkpoint

from makeready.graphs import artifact
from makeready.graphs.compile import compile_plan
from makeready.graphs.targets import TARGETS

COLD_START = Path(__file__).with_name("cold_start.py")
QWEN3_8B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def bench(layers: int = 12, plan_folder: Path | None = None) -> dict[str, Any]:
    """Print the phases of loading and the host's share of steps; returns the figures."""
    config = {**QWEN3_8B, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as temporary:
        begin = time.perf_counter()
        checkpoint = write_checkpoint(Path(temporary) / "checkpoint", config, scale=0.02)
        print(f"wrote {layers} layers in {time.perf_counter() - begin:.1f} s", flush=True)
        if plan_folder is None:
            begin = time.perf_counter()
            arch = sum(
                n * scale for n, scale in zip(torch.cuda.get_device_capability(), (10, 1), strict=True)
            )
            target = next(t.name for t in TARGETS.values() if t.arch == arch)
            plan = compile_plan(
                checkpoint,
                target=target,
                max_rows=256,
                max_tokens=8192,
                context_len=8192,
                max_decode_buckets=16,
                max_extend_buckets=16,
            )
            plan_folder = artifact.save(plan, Path(temporary) / "plan")
            print(f"compiled the plan in {time.perf_counter() - begin:.1f} s", flush=True)
        made = {}
        for name, source in (("first", checkpoint.path), ("cached", checkpoint.path), ("dummy", "dummy")):
            made[name] = _child(source, config, plan_folder)
            _show(name, made[name])
    return made


def _child(source: Path | str, config: dict[str, Any], plan_folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, str(COLD_START), str(source), json.dumps(config), str(plan_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return {"process": time.perf_counter() - begin, **json.loads(ran.stdout.splitlines()[-1])}


def _show(name: str, made: dict[str, Any]) -> None:
    rate = made["weights"] / made["phases"]["weights"] / 1e9
    until = made["imports"] + made["plan"] + made["load"] + made["first_step"]
    print(f"\n{name}: {until:.2f} s to the first step; foreign modules: {made['foreign'] or 'none'}")
    print(f"  imports {made['imports']:.3f}  plan {made['plan']:.3f}  first step {made['first_step']:.3f}")
    print("  " + "  ".join(f"{k} {v:.3f}" for k, v in made["phases"].items()))
    print(f"  weights {made['weights'] / 1e9:.1f} GB at {rate:.1f} GB/s; {made['pages']} KV pages")
    print(f"  {made['graphs']} graphs, {made['nodes']} launches, {made['graph_mib']:.1f} MiB of the driver's")
    print(f"  {made['slot_us']:.0f} µs a slot, {made['slots_behind_ms']:.1f} ms with the step it ran behind")
    for bucket, (milliseconds, host) in made["steps"].items():
        print(f"  {bucket:>20}  {milliseconds:8.3f} ms a step  {host:6.0f} µs of the host")


def record(made: dict[str, Any], path: Path) -> None:
    """Write the figures with the device, the versions and the command behind them."""
    versions = {name: version(name) for name in ("torch", "triton", "cuda-bindings", "numpy")}
    head = {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": os.environ.get("COMMIT", "unknown"),
        "command": " ".join(["python", *sys.argv]),
    }
    path.write_text(json.dumps({**head, "runs": made}, indent=1) + "\n")


if __name__ == "__main__":
    figures = bench(
        int(sys.argv[1]) if len(sys.argv) > 1 else 12,
        Path(sys.argv[2]) if len(sys.argv) > 2 else None,
    )
    if len(sys.argv) > 3:
        record(figures, Path(sys.argv[3]))
