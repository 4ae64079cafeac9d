"""Latent attention in CUDA C++ as it is compiled for Hopper: registers, shared memory, waits, no spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc")

from small_programs import TARGET

from makeready.graphs.planner.cuda import aot
from makeready.kernels.attention import mla_decode_cuda, mla_own_cuda
from makeready.kernels.device import OpCall, Tensor

_WIDTH, _RANK = 576, 512


def latents(heads: int, *, extend: bool, dtype: str = "bfloat16", page: int = 64) -> OpCall:
    """16 rows, of one token or of 64."""
    rows, tokens = 16, 1024 if extend else 16
    each = Tensor((rows,), "int32", 1, 256)
    tensors = {
        "q": Tensor((tokens, heads * _WIDTH), dtype, heads * _WIDTH, 256),
        "cache": Tensor(("P", page, _WIDTH), dtype, page * _WIDTH, 256),
        "page_table": Tensor((rows, 100), "int32", 100, 256),
        "context_len": each,
        "y": Tensor((tokens, heads * _RANK), dtype, heads * _RANK, 256),
    }
    attrs = {"heads": heads, "rank": _RANK, "rope": 64, "scale": 0.1}
    if extend:
        tensors |= {
            "query_start": each,
            "query_len": each,
            "log_sum": Tensor((tokens, heads), "float32", heads, 256),
        }
        attrs["own"] = False
    op = "mla_extend_attention" if extend else "mla_decode_attention"
    return OpCall(op, tensors, attrs, {}, rows, tokens, features=TARGET.features)


@pytest.mark.parametrize(
    ("heads", "extend", "dtype"),
    [
        (5, False, "bfloat16"),
        (16, False, "float16"),
        (32, False, "bfloat16"),
        (128, False, "bfloat16"),
        (16, True, "bfloat16"),
    ],
)
def test_latents(heads: int, extend: bool, dtype: str) -> None:
    """Warps of 64 vectors' products share the registers of a multiprocessor by roles."""
    call = latents(heads, extend=extend, dtype=dtype)
    (way,) = mla_decode_cuda.mla_attention_wgmma(call)
    attention, combine = (aot.compile_launch(launch, call) for launch in way.launches)
    cut = mla_decode_cuda.cut(heads, extend=extend)
    assert cut is not None
    wide = cut.columns == 64
    assert attention.warps == (16 if wide else 12)
    assert attention.registers <= (128 if wide else 168)
    assert ("setmaxnreg" in attention.ptx) == wide
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert f"wgmma.mma_async.sync.aligned.m64n{cut.columns}k16.f32.{kind}.{kind}" in attention.ptx
    assert "stmatrix.sync.aligned.m8n8.x2.trans" in attention.ptx
    for made in (attention, combine):
        assert made.spill_bytes == 0
        assert made.shared <= call.shared_bytes
        assert made.waits
    assert way.zeroed == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_own_tokens(dtype: str) -> None:
    tokens, heads = 1024, 16
    widths = {"q": heads * 192, "kv": heads * 256, "latent": _WIDTH, "y": heads * 128}
    tensors = {name: Tensor((tokens, width), dtype, width, 256) for name, width in widths.items()}
    tensors |= dict.fromkeys(("query_start", "query_len"), Tensor((16,), "int32", 1, 256))
    tensors["log_sum"] = Tensor((tokens, heads), "float32", heads, 256)
    attrs = {"heads": heads, "nope": 128, "rope": 64, "value": 128, "rank": _RANK, "scale": 0.1}
    call = OpCall("mla_own_attention", tensors, attrs, {}, 16, tokens, features=TARGET.features)
    (way,) = mla_own_cuda.mla_own_attention_wgmma(call)
    (launch,) = way.launches
    made = aot.compile_launch(launch, call)
    assert (made.warps, made.registers, made.spill_bytes) == (12, 168, 0)
    assert made.shared <= call.shared_bytes
    assert made.waits
    assert (way.scratch, way.zeroed) == (256, 256)
    assert "GIVE_UP" not in launch.constants
    assert mla_own_cuda.candidate(call, give_up=123).launches[0].constants["GIVE_UP"] == 123
