"""Random valid inputs of every op contract, at shapes where kernels go wrong.

One builder an op, in :data:`BUILDERS`: a generator of :class:`Case` over awkward shapes, the first of them
an ordinary one. All tests that need a call of some op take it from here, whatever the backend.

    T tokens, R rows, H query heads, D head size, Q rotated features
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import delta_inputs
import eight_bit_inputs
import gguf_inputs
import int_inputs
import mla_inputs
import moe_inputs
import mx_inputs
import nvfp4_inputs
import scaled_inputs
import torch
import tree_inputs
from attention_inputs import (
    decode_attention,
    extend_attention,
    kv_write,
    norm_rope_kv_write,
    norm_rope_kv_write_decode_attention,
    verify_attention,
)
from case import FLOATS, Case, Random, in_columns, int32
from rope_inputs import rope, rope_rows, rope_rows_dynamic, rope_rows_logn, rope_rows_stepped
from sample_inputs import sample, token_logprobs
from step_inputs import (
    accept_drafts,
    count_drafts,
    draft_ngram,
    find_pages,
    force_drafts,
    hidden_read,
    hidden_write,
    locate,
    next_draft,
    pack_drafts,
    place_before,
    spread_logits,
)


def _pointwise(op: str, *names: str, even: bool = False) -> Iterator[Case]:
    shapes = [(3, 10), (1, 2), (1, 576), (7, 64), (33, 1536), (512, 18)]
    for seed, ((tokens, width), dtype) in enumerate(itertools.product(shapes, FLOATS)):
        random = Random(seed)
        made = {name: random.normal(tokens, width, dtype=dtype, scale=3) for name in names}
        yield Case(op, f"{tokens}x{width}-{dtype}", made)
    odd = {name: random.normal(5, 6 if even else 7) for name in names}
    yield Case(op, "odd", odd)
    yield Case(op, "columns", {name: in_columns(x) for name, x in odd.items()})
    extreme = torch.tensor([[0.0, -0.0, 1e-30, -1e30, 88.0, -88.0, 1e4, -1e4]])
    yield Case(op, "extreme", {name: extreme if name == names[0] else torch.ones(1, 8) for name in names})


def pad_columns(op: str) -> Iterator[Case]:
    for tokens, width, whole in ((3, 10, 12), (1, 1, 2), (7, 64, 64), (33, 1500, 1536)):
        for dtype in FLOATS:
            x = Random(width).normal(tokens, width, dtype=dtype)
            yield Case(op, f"{tokens}x{width}-{dtype}", {"x": x}, {"width": whole})
            yield Case(op, f"{tokens}x{width}-{dtype}-columns", {"x": in_columns(x)}, {"width": whole})


def concatenate(op: str) -> Iterator[Case]:
    for tokens, left, right in ((3, 10, 12), (1, 1, 2), (7, 64, 64), (33, 1500, 36)):
        for dtype in FLOATS:
            x, y = (Random(width).normal(tokens, width, dtype=dtype) for width in (left, right))
            yield Case(op, f"{tokens}x{left}+{right}-{dtype}", {"x": x, "y": y})
            yield Case(
                op, f"{tokens}x{left}+{right}-{dtype}-columns", {"x": in_columns(x), "y": in_columns(y)}
            )


def columns(op: str) -> Iterator[Case]:
    x = Random(0).normal(3, 10)
    for start, stop in ((2, 7), (0, 10), (0, 1), (9, 10)):
        yield Case(op, f"{start}:{stop}", {"x": x}, {"start": start, "stop": stop})
    yield Case(op, "of-columns", {"x": in_columns(x)}, {"start": 2, "stop": 7})


def gather_last(op: str) -> Iterator[Case]:
    for label, lengths, spare in (
        ("rows", [3, 1, 5], 2),
        ("one", [1], 0),
        ("padding", [2, 0, 4, 0, 0], 3),
        ("all-padding", [0, 0], 1),
    ):
        starts = [sum(lengths[:r]) if n else 0 for r, n in enumerate(lengths)]
        for dtype in FLOATS:
            x = Random(1).normal(sum(lengths) + spare, 6, dtype=dtype)
            operands = {"x": x, "query_start": int32(starts), "query_len": int32(lengths)}
            yield Case(op, f"{label}-{dtype}", operands)


def embedding(op: str) -> Iterator[Case]:
    for dtype, out in itertools.product(FLOATS, ("", *FLOATS)):
        weight = Random(3).normal(11, 6, dtype=dtype)
        yield Case(op, f"{dtype}-{out}", {"ids": int32([10, 0, 3, 3]), "weight": weight}, {"out_dtype": out})
    yield Case(op, "one", {"ids": int32([2]), "weight": Random(3).normal(3, 1)}, {"out_dtype": ""})


def sigmoid_gate(op: str) -> Iterator[Case]:
    for seed, case in enumerate(_pointwise(op, "x")):
        gate = Random(seed).normal(len(case.operands["x"]), 1, scale=3)
        yield Case(op, case.label, case.operands | {"gate": in_columns(gate) if seed % 2 else gate})


def scale_columns(op: str) -> Iterator[Case]:
    for seed, case in enumerate(_pointwise(op, "x")):
        by = Random(seed).uniform(case.operands["x"].shape[1])
        yield Case(op, case.label, case.operands | {"scale": by})


def linear(op: str) -> Iterator[Case]:
    shapes = [(3, 10, 7), (1, 1, 1), (1, 576, 192), (5, 64, 131), (17, 96, 33), (33, 130, 1), (129, 64, 64)]
    dtypes = [("float32", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
    dtypes += [("bfloat16", "bfloat16"), ("float16", "float16")]
    for seed, ((tokens, inputs, outputs), (act, stored)) in enumerate(itertools.product(shapes, dtypes)):
        random = Random(seed)
        x, weight = random.normal(tokens, inputs, dtype=act), random.normal(outputs, inputs, dtype=stored)
        for bias, out in ((None, ""), (act, ""), (stored, "float32"), (None, "bfloat16")):
            operands = {"x": x, "weight": weight}
            if bias:
                operands["bias"] = random.normal(outputs, dtype=bias)
            label = f"{tokens}x{inputs}x{outputs}-{act}-{stored}-{bias}-{out}"
            yield Case(op, label, operands, {"out_dtype": out})
    operands = {"x": in_columns(random.normal(6, 48)), "weight": random.normal(20, 48, dtype="bfloat16")}
    yield Case(op, "columns", operands, {"out_dtype": ""})


def _norm(op: str, *names: str) -> Iterator[Case]:
    shapes = [(3, 10), (1, 1), (1, 576), (7, 65), (33, 1536)]
    for seed, ((tokens, width), act) in enumerate(itertools.product(shapes, FLOATS)):
        for stored, eps, offset in ((act, 1e-6, 0.0), ("float32", 1e-5, 0.0), (act, 1e-6, 1.0)):
            random = Random(seed)
            operands = {name: random.normal(tokens, width, dtype=act, scale=2) for name in names}
            operands["weight"] = random.uniform(width, dtype=stored)
            label = f"{tokens}x{width}-{act}-{stored}-{eps}+{offset}"
            yield Case(op, label, operands, {"eps": eps, "offset": offset})
    for label, scale in (("tiny", 1e-4), ("huge", 1e6), ("zero", 0.0)):
        operands = {name: Random(4).normal(3, 8, scale=scale) for name in names}
        yield Case(op, label, operands | {"weight": Random(5).uniform(8)}, {"eps": 1e-6})
    operands = {name: in_columns(Random(6).normal(4, 9)) for name in names}
    yield Case(op, "columns", operands | {"weight": Random(5).uniform(9)}, {"eps": 1e-6})


def _norm_linear(op: str, *names: str, gate: bool = False) -> Iterator[Case]:
    shapes = [(3, 10, 6), (1, 1, 2), (1, 576, 192), (5, 64, 130)]
    for seed, ((tokens, inputs, outputs), act) in enumerate(itertools.product(shapes, FLOATS)):
        random = Random(seed)
        operands = {name: random.normal(tokens, inputs, dtype=act, scale=2) for name in names}
        operands |= {"gain": random.uniform(inputs, dtype=act)}
        operands |= {"weight": random.normal(outputs, inputs, dtype=act)}
        for bias, offset, out in ((False, 0.0, ""), (True, 1.0, "" if gate else "float32")):
            given = operands | ({"bias": random.normal(outputs, dtype=act)} if bias else {})
            attrs = {"eps": 1e-6, "offset": offset, "out_dtype": out}
            yield Case(op, f"{tokens}x{inputs}x{outputs}-{act}-{bias}", given, attrs)


def _linear_fp8_chain(op: str, *names: str, norm: bool = False) -> Iterator[Case]:
    shapes = [(3, 16, 6), (1, 2, 1), (1, 576, 192), (5, 64, 130)]
    for seed, ((tokens, inputs, outputs), act) in enumerate(itertools.product(shapes, FLOATS)):
        random = Random(seed)
        width = 2 * inputs if names == ("gate_up",) else inputs
        operands = {name: random.normal(tokens, width, dtype=act, scale=2) for name in names}
        operands |= {"gain": random.uniform(inputs, dtype=act)} if norm else {}
        operands |= {
            "weight": eight_bit_inputs.fp8(random, outputs, inputs),
            "weight_scale": random.uniform(outputs),
        }
        attrs = {"group": inputs, "out_dtype": "bfloat16"} | ({"eps": 1e-6, "offset": 0.0} if norm else {})
        for bias in (False, True):
            given = operands | ({"bias": random.normal(outputs, dtype=act)} if bias else {})
            yield Case(op, f"{tokens}x{inputs}x{outputs}-{act}-{bias}", given, attrs)


def _grouped(made: Iterator[Case], width_of: Callable[[Case], int]) -> Iterator[Case]:
    """Cases of what is quantized, with one group a token, then with groups that divide its width."""
    for case in made:
        width = width_of(case)
        for group in {width, *(g for g in (128, 64, 3) if width % g == 0)}:
            yield Case(case.op, f"{case.label}-g{group}", case.operands, case.attrs | {"group": group})


def _width(name: str, over: int = 1) -> Callable[[Case], int]:
    return lambda case: case.operands[name].shape[1] // over


def quantize_fp8_static(op: str) -> Iterator[Case]:
    """The scale of the second half is so small that most values saturate."""
    for case, scale in itertools.product(_pointwise(op, "x"), (0.02, 0.001)):
        label = f"{case.label}-{scale}"
        yield Case(op, label, case.operands | {"scale": torch.tensor([scale])})


def head_rms_norm(op: str) -> Iterator[Case]:
    for heads, size, act in itertools.product((3, 1), (32, 80), FLOATS):
        random = Random(heads)
        for tokens in (5, 1):
            x = random.normal(tokens, heads * size, dtype=act)
            operands = {"x": x, "weight": random.uniform(size, dtype=act)}
            attrs = {"eps": 1e-6, "heads": heads, "head_dim": size, "offset": float(heads == 1)}
            yield Case(op, f"{tokens}x{heads}x{size}-{act}", operands, attrs)
            yield Case(op, f"{tokens}x{heads}x{size}-{act}-columns", operands | {"x": in_columns(x)}, attrs)


def scale(op: str) -> Iterator[Case]:
    for case in _pointwise(op, "x"):
        yield Case(op, case.label, case.operands, {"by": 25.25})


def clamped_swiglu(op: str) -> Iterator[Case]:
    for case in _pointwise(op, "gate_up", even=True):
        for attrs in ({"alpha": 1.702, "limit": 7.0}, {"alpha": 1.0, "limit": 0.5}):
            yield Case(op, f"{case.label}-{attrs['limit']}", case.operands, attrs)


BUILDERS: Mapping[str, Callable[[str], Iterator[Case]]] = {
    "add": lambda op: _pointwise(op, "x", "y"),
    "multiply": lambda op: _pointwise(op, "x", "y"),
    "scale_columns": scale_columns,
    "silu": lambda op: _pointwise(op, "x"),
    "gelu_tanh": lambda op: _pointwise(op, "x"),
    "gelu_tanh_mul": lambda op: _pointwise(op, "gate_up", even=True),
    "clamped_swiglu": clamped_swiglu,
    "scale": scale,
    "silu_mul": lambda op: _pointwise(op, "gate_up", even=True),
    "columns": columns,
    "pad_columns": pad_columns,
    "gather_last": gather_last,
    "locate": locate,
    "find_pages": find_pages,
    "draft_ngram": draft_ngram,
    "accept_drafts": accept_drafts,
    "count_drafts": count_drafts,
    "next_draft": next_draft,
    "pack_drafts": pack_drafts,
    "force_drafts": force_drafts,
    "hidden_write": hidden_write,
    "hidden_read": hidden_read,
    "place_before": place_before,
    "spread_logits": spread_logits,
    **{
        op: getattr(tree_inputs, op)
        for op in (
            *(
                "plant_tree",
                "place_level",
                "grow_tree",
                "exclude",
                "take_parents",
                "pack_tree",
                "accept_tree",
            ),
            *("order_results", "place_moves", "move_entries", "move_states", "tree_attention"),
        )
    },
    "concatenate": concatenate,
    "embedding": embedding,
    "linear": linear,
    "linear_gguf": gguf_inputs.linear_gguf,
    "embedding_gguf": gguf_inputs.embedding_gguf,
    "repack_gguf": gguf_inputs.repack_gguf,
    "scales_gguf": gguf_inputs.scales_gguf,
    "offsets_gguf": gguf_inputs.offsets_gguf,
    "rms_norm": lambda op: _norm(op, "x"),
    "add_rms_norm": lambda op: _norm(op, "x", "residual"),
    "rms_norm_linear": lambda op: _norm_linear(op, "x"),
    "add_rms_norm_linear": lambda op: _norm_linear(op, "x", "residual"),
    "add_rms_norm_linear_silu_mul": lambda op: _norm_linear(op, "x", "residual", gate=True),
    "quantize_fp8_linear_fp8": lambda op: _linear_fp8_chain(op, "x"),
    "rms_norm_quantize_fp8_linear_fp8": lambda op: _linear_fp8_chain(op, "x", norm=True),
    "add_rms_norm_quantize_fp8_linear_fp8": lambda op: _linear_fp8_chain(op, "x", "residual", norm=True),
    "silu_mul_quantize_fp8_linear_fp8": lambda op: _linear_fp8_chain(op, "gate_up"),
    "quantize_fp8": lambda op: _grouped(_pointwise(op, "x"), _width("x")),
    "quantize_fp8_static": quantize_fp8_static,
    "quantize_fp8_block": eight_bit_inputs.quantize_fp8_block,
    "dequantize_fp8": eight_bit_inputs.dequantize_fp8,
    "dequantize_fp8_block": eight_bit_inputs.dequantize_fp8,
    "rms_norm_quantize_fp8": lambda op: _grouped(_norm(op, "x"), _width("x")),
    "add_rms_norm_quantize_fp8": lambda op: _grouped(_norm(op, "x", "residual"), _width("x")),
    "add_rms_norm_and_quantize_fp8": lambda op: _grouped(_norm(op, "x", "residual"), _width("x")),
    "silu_mul_quantize_fp8": lambda op: _grouped(_pointwise(op, "gate_up", even=True), _width("gate_up", 2)),
    "quantize_int8": lambda op: _grouped(_pointwise(op, "x"), _width("x")),
    "quantize_int8_static": quantize_fp8_static,
    "dequantize_int8": eight_bit_inputs.dequantize_fp8,
    "rms_norm_quantize_int8": lambda op: _grouped(_norm(op, "x"), _width("x")),
    "add_rms_norm_quantize_int8": lambda op: _grouped(_norm(op, "x", "residual"), _width("x")),
    "add_rms_norm_and_quantize_int8": lambda op: _grouped(_norm(op, "x", "residual"), _width("x")),
    "silu_mul_quantize_int8": lambda op: _grouped(_pointwise(op, "gate_up", even=True), _width("gate_up", 2)),
    "linear_fp8": eight_bit_inputs.linear_fp8,
    "linear_int8": eight_bit_inputs.linear_int8,
    "linear_fp8_block": eight_bit_inputs.linear_fp8_block,
    "head_rms_norm": head_rms_norm,
    "rope_rows": rope_rows,
    "rope_rows_dynamic": rope_rows_dynamic,
    "rope_rows_stepped": rope_rows_stepped,
    "rope_rows_logn": rope_rows_logn,
    "rope": rope,
    "kv_write": kv_write,
    "norm_rope_kv_write": norm_rope_kv_write,
    "norm_rope_kv_write_decode_attention": norm_rope_kv_write_decode_attention,
    "decode_attention": decode_attention,
    "extend_attention": extend_attention,
    "verify_attention": verify_attention,
    "paged_attention": extend_attention,
    "kv_write_scaled": scaled_inputs.kv_write_scaled,
    "norm_rope_kv_write_scaled": scaled_inputs.norm_rope_kv_write_scaled,
    "decode_attention_scaled": scaled_inputs.decode_attention_scaled,
    "extend_attention_scaled": scaled_inputs.extend_attention_scaled,
    "verify_attention_scaled": scaled_inputs.verify_attention_scaled,
    "paged_attention_scaled": scaled_inputs.extend_attention_scaled,
    "mla_write": mla_inputs.mla_write,
    "mla_write_scaled": mla_inputs.mla_write_scaled,
    "mla_rope": mla_inputs.mla_rope,
    "mla_absorb": mla_inputs.mla_absorb,
    "mla_values": mla_inputs.mla_values,
    "mla_extend_attention": mla_inputs.mla_extend_attention,
    "mla_extend_attention_scaled": mla_inputs.mla_extend_attention_scaled,
    "mla_decode_attention": mla_inputs.mla_decode_attention,
    "mla_decode_attention_scaled": mla_inputs.mla_decode_attention_scaled,
    "mla_own_attention": mla_inputs.mla_own_attention,
    "merge_attention": mla_inputs.merge_attention,
    "mla_attention": mla_inputs.mla_attention,
    "mla_attention_scaled": mla_inputs.mla_attention_scaled,
    "sigmoid_gate": sigmoid_gate,
    "route": moe_inputs.route,
    "sort_by_expert": moe_inputs.sort,
    "route_and_sort": lambda op: moe_inputs.sorted_too(moe_inputs.route(op)),
    "combine": moe_inputs.combine,
    "combine_add_rms_norm": moe_inputs.combine_norm,
    "combine_add_rms_norm_quantize_fp8": moe_inputs.combine_norm,
    "combine_add_rms_norm_quantize_int8": moe_inputs.combine_norm,
    "grouped_linear": lambda op: itertools.chain(
        moe_inputs.grouped_linear(op), moe_inputs.biased(moe_inputs.grouped_linear(op))
    ),
    "grouped_clamped_swiglu": lambda op: moe_inputs.biased(
        moe_inputs.gated(moe_inputs.grouped_linear(op)), alpha=1.702, limit=1.5
    ),
    "grouped_linear_fp8": moe_inputs.grouped_linear_fp8,
    "grouped_linear_int8": moe_inputs.grouped_linear_fp8,
    "grouped_linear_fp8_block": moe_inputs.grouped_linear_fp8_block,
    "grouped_silu_mul": lambda op: moe_inputs.gated(moe_inputs.grouped_linear(op)),
    "grouped_silu_mul_fp8": lambda op: moe_inputs.gated(moe_inputs.grouped_linear_fp8(op)),
    "grouped_silu_mul_int8": lambda op: moe_inputs.gated(moe_inputs.grouped_linear_fp8(op)),
    "grouped_silu_mul_fp8_block": lambda op: moe_inputs.gated(moe_inputs.grouped_linear_fp8_block(op)),
    "grouped_linear_mx": lambda op: itertools.chain(
        mx_inputs.grouped_linear_mx(op), moe_inputs.biased(mx_inputs.grouped_linear_mx(op))
    ),
    "grouped_clamped_swiglu_mx": lambda op: moe_inputs.biased(
        mx_inputs.grouped_linear_mx(op), alpha=1.702, limit=7.0
    ),
    "grouped_silu_mul_mx": mx_inputs.grouped_linear_mx,
    "linear_mx": mx_inputs.linear_mx,
    "quantize_mx": mx_inputs.quantize_mx,
    "dequantize_mx": mx_inputs.dequantize_mx,
    "repack_bytes": mx_inputs.repack_bytes,
    "pair_scales": nvfp4_inputs.pair_scales,
    "check_global_scales": nvfp4_inputs.check_global_scales,
    "make_global_scales": nvfp4_inputs.make_global_scales,
    "quantize_nvfp4": nvfp4_inputs.quantize_nvfp4,
    "linear_int": int_inputs.linear_int,
    "embedding_int": int_inputs.embedding_int,
    "grouped_linear_int": int_inputs.grouped_linear_int,
    "repack_rows": int_inputs.repack_rows,
    "repack_awq": int_inputs.repack_awq,
    "unpack_zeros": int_inputs.unpack_zeros,
    "tile_scales": int_inputs.tile_scales,
    "order_of_groups": int_inputs.order_of_groups,
    "quantize_int": int_inputs.quantize_int,
    "dequantize_int": int_inputs.dequantize_int,
    "gather_columns": int_inputs.gather_columns,
    "repack_pairs": int_inputs.repack_pairs,
    "grouped_silu_mul_int": int_inputs.grouped_linear_int,
    "sigmoid_mul": lambda op: _pointwise(op, "x", "gate"),
    "gated_head_rms_norm": delta_inputs.gated_head_rms_norm,
    "causal_conv_silu": delta_inputs.causal_conv_silu,
    "gated_delta_rule": delta_inputs.delta_rule,
    "recurrent_delta_rule": delta_inputs.delta_rule,
    "chunk_delta_rule": delta_inputs.delta_rule,
    "sample": sample,
    "token_logprobs": token_logprobs,
}


def cases(op: str) -> Iterator[Case]:
    """All cases of ``op``.

    Raises:
        LookupError: nobody said yet what valid inputs of ``op`` are.
    """
    if op not in BUILDERS:
        raise LookupError(f"op {op} has no inputs; add a builder to tests/kernels/inputs.py")
    return BUILDERS[op](op)
