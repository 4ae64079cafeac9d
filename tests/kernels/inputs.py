"""Random valid inputs of every op contract, at shapes where kernels go wrong.

One builder an op, in :data:`BUILDERS`: a generator of :class:`Case` over awkward shapes, the first of them
an ordinary one. All tests that need a call of some op take it from here, whatever the backend.

    T tokens, R rows, H query heads, G KV heads, D head size, Q rotated features, S slots, L context
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.spec import TensorSpec

NAN, INF = float("nan"), float("inf")


@dataclass
class Case:
    """One call of an op: operands (absent optionals left out) and attributes."""

    op: str
    label: str
    operands: dict[str, torch.Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def contract(self) -> Contract:
        return CONTRACTS[self.op]

    def specs(self) -> dict[str, TensorSpec]:
        """Specs of the operands."""
        return {name: spec_of(x) for name, x in self.operands.items()}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The case with every operand changed."""
        return Case(self.op, self.label, {k: change(x) for k, x in self.operands.items()}, self.attrs)

    def run(self, function: Callable[..., Any] | None = None) -> dict[str, torch.Tensor]:
        """Results and written operands of one call on copies of the operands, by name.

        Args:
            function: an implementation; the contract's reference where it is None.
        """
        operands = {k: copy(x) for k, x in self.operands.items()}
        arguments = [operands.get(o.name) for o in self.contract.inputs]
        made = (function or self.contract.reference)(*arguments, **self.attrs)
        made = made if isinstance(made, tuple) else (made,)
        results = {o.name: x for o, x in zip(self.contract.outputs, made, strict=False)}
        return results | {name: operands[name] for name in self.contract.writes}


def spec_of(x: torch.Tensor) -> TensorSpec:
    """Spec of a tensor."""
    return TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def copy(x: Any) -> Any:
    """A copy that keeps strides (columns of a wider buffer stay such)."""
    if not isinstance(x, torch.Tensor):  # a packed parameter, which nobody writes
        return x
    if x.is_contiguous() or x.dim() != 2:
        return x.clone()
    wide = torch.full((x.shape[0], x.stride(0)), NAN, dtype=x.dtype)
    return wide[:, : x.shape[1]].copy_(x)


def in_columns(x: torch.Tensor, before: int = 3, after: int = 5) -> torch.Tensor:
    """``x`` as columns of a wider buffer whose other columns are NaN, as lowering places views."""
    wide = torch.full((x.shape[0], before + x.shape[1] + after), NAN, dtype=x.dtype)
    view = wide[:, before : before + x.shape[1]]
    view.copy_(x)
    return view


def int32(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Random:
    """Seeded tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(getattr(torch, dtype))

    def uniform(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        """Between 0.5 and 1.5: weights of norms."""
        return (torch.rand(*shape, generator=self.generator) + 0.5).to(getattr(torch, dtype))

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator, dtype=torch.int32)

    def rotary(self, tokens: int, features: int) -> torch.Tensor:
        """Rotary rows of random angles."""
        angle = torch.rand(tokens, features // 2, generator=self.generator) * 100
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator)


FLOATS = ("float32", "bfloat16", "float16")


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


def load_tokens(op: str) -> Iterator[Case]:
    history = Random(2).integers(100, 4, 9)
    for label, ids, slots, positions in (
        ("host", [5, 6, 7], [0, 0, 1], [0, 1, 8]),
        ("device", [-1], [2], [4]),
        ("mixed", [-1, 9, -1, 11], [1, 0, 2, 0], [3, 1, 0, 2]),
        ("padding", [8, 0, 0], [1, 3, 3], [2, 0, 0]),
    ):
        operands = {"token_ids": int32(ids), "token_slot": int32(slots), "positions": int32(positions)}
        yield Case(op, label, operands | {"history": history})


def embedding(op: str) -> Iterator[Case]:
    for dtype, out in itertools.product(FLOATS, ("", *FLOATS)):
        weight = Random(3).normal(11, 6, dtype=dtype)
        yield Case(op, f"{dtype}-{out}", {"ids": int32([10, 0, 3, 3]), "weight": weight}, {"out_dtype": out})
    yield Case(op, "one", {"ids": int32([2]), "weight": Random(3).normal(3, 1)}, {"out_dtype": ""})


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
        for stored, eps in ((act, 1e-6), ("float32", 1e-5)):
            random = Random(seed)
            operands = {name: random.normal(tokens, width, dtype=act, scale=2) for name in names}
            operands["weight"] = random.uniform(width, dtype=stored)
            yield Case(op, f"{tokens}x{width}-{act}-{stored}-{eps}", operands, {"eps": eps})
    for label, scale in (("tiny", 1e-4), ("huge", 1e6), ("zero", 0.0)):
        operands = {name: Random(4).normal(3, 8, scale=scale) for name in names}
        yield Case(op, label, operands | {"weight": Random(5).uniform(8)}, {"eps": 1e-6})
    operands = {name: in_columns(Random(6).normal(4, 9)) for name in names}
    yield Case(op, "columns", operands | {"weight": Random(5).uniform(9)}, {"eps": 1e-6})


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


def quantize_fp8_block(op: str) -> Iterator[Case]:
    shapes = [(6, 8, 4), (1, 1, 4), (128, 256, 128), (200, 384, 128), (37, 50, 16)]
    for seed, ((rows, width, block), dtype) in enumerate(itertools.product(shapes, FLOATS)):
        x = Random(seed).normal(rows, width, dtype=dtype)
        yield Case(op, f"{rows}x{width}x{block}-{dtype}", {"x": x}, {"block": block})
    yield Case(op, "zero", {"x": torch.zeros(5, 8)}, {"block": 4})


def _fp8(random: Random, *shape: int) -> torch.Tensor:
    """Every magnitude of the format, the largest included."""
    return random.normal(*shape, scale=60).clamp(-448, 448).to(torch.float8_e4m3fn)


LINEAR_OUT = (("bfloat16", None), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", None))


def linear_fp8(op: str) -> Iterator[Case]:
    shapes = [(3, 16, 7), (1, 1, 1), (1, 576, 192), (17, 96, 33), (129, 64, 64), (5, 4096, 48)]
    for seed, ((tokens, inputs, outputs), (out, bias)) in enumerate(itertools.product(shapes, LINEAR_OUT)):
        random = Random(seed)
        operands = {"x": _fp8(random, tokens, inputs), "x_scale": random.uniform(tokens, 1) / 100}
        operands |= {"weight": _fp8(random, outputs, inputs), "weight_scale": random.uniform(outputs) / 500}
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        yield Case(op, f"{tokens}x{inputs}x{outputs}-{bias}-{out}", operands, {"out_dtype": out})


def linear_fp8_block(op: str) -> Iterator[Case]:
    shapes = [(3, 32, 7, 16), (1, 8, 1, 8), (1, 512, 192, 128), (17, 128, 128, 128), (9, 384, 300, 128)]
    for seed, ((tokens, inputs, outputs, block), (out, bias)) in enumerate(
        itertools.product(shapes, LINEAR_OUT)
    ):
        random = Random(seed)
        groups, bands = inputs // block, -(-outputs // block)
        operands = {"x": _fp8(random, tokens, inputs), "x_scale": random.uniform(tokens, groups) / 100}
        operands |= {"weight": _fp8(random, outputs, inputs)}
        operands |= {"weight_scale": random.uniform(bands, groups) / 500}
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        attrs = {"out_dtype": out, "block": block}
        yield Case(op, f"{tokens}x{inputs}x{outputs}/{block}-{bias}-{out}", operands, attrs)


def head_rms_norm(op: str) -> Iterator[Case]:
    for heads, size, act in itertools.product((3, 1), (32, 80), FLOATS):
        random = Random(heads)
        for tokens in (5, 1):
            x = random.normal(tokens, heads * size, dtype=act)
            operands = {"x": x, "weight": random.uniform(size, dtype=act)}
            attrs = {"eps": 1e-6, "heads": heads, "head_dim": size}
            yield Case(op, f"{tokens}x{heads}x{size}-{act}", operands, attrs)
            yield Case(op, f"{tokens}x{heads}x{size}-{act}-columns", operands | {"x": in_columns(x)}, attrs)


def rope_rows(op: str) -> Iterator[Case]:
    table = Random(7).rotary(13, 8)
    for label, positions in (("any", [12, 0, 5, 5]), ("one", [3])):
        yield Case(op, label, {"positions": int32(positions), "table": table})


def rope_rows_dynamic(op: str) -> Iterator[Case]:
    attrs = {"rotary_dim": 16, "theta": 10000.0, "factor": 4.0, "original_context": 32}
    operands = {
        "positions": int32([0, 31, 32, 50, 100, 3, 0]),
        "token_slot": int32([0, 0, 0, 1, 1, 2, 3]),
        "prompt_len": int32([33, 51, 120, 0]),
    }
    yield Case(op, "any", operands, attrs)
    one = {"positions": int32([40]), "token_slot": int32([0]), "prompt_len": int32([41, 0])}
    yield Case(op, "one", one, attrs | {"rotary_dim": 6, "factor": 1.0})


def rope(op: str) -> Iterator[Case]:
    for (heads, size, rotary), act in itertools.product(((3, 32, 32), (1, 80, 20), (8, 64, 2)), FLOATS):
        random = Random(size)
        for tokens in (5, 1):
            operands = {"x": random.normal(tokens, heads * size, dtype=act)}
            operands["rows"] = random.rotary(tokens, rotary)
            attrs = {"heads": heads, "head_dim": size}
            label = f"{tokens}x{heads}x{size}/{rotary}-{act}"
            yield Case(op, label, operands, attrs)
            yield Case(op, f"{label}-columns", operands | {"x": in_columns(operands["x"])}, attrs)


@dataclass(frozen=True)
class Heads:
    """Geometry of attention: H query heads, G KV heads, D head size, page size."""

    heads: int
    kv_heads: int
    size: int
    page: int = 8

    @property
    def label(self) -> str:
        return f"H{self.heads}G{self.kv_heads}D{self.size}P{self.page}"


GEOMETRIES = (
    Heads(4, 2, 32),
    Heads(3, 3, 64),
    Heads(9, 3, 64, page=16),
    Heads(3, 1, 80),
    Heads(8, 1, 128, page=1),
    Heads(16, 2, 32, page=5),
)
ACT_AND_CACHE = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))


def _caches(random: Random, heads: Heads, pages: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of NaN, so that whatever is read without having been written shows."""
    shape = (pages, heads.page, heads.kv_heads, heads.size)
    return tuple(torch.full(shape, NAN, dtype=getattr(torch, dtype)) for _ in range(2))  # type: ignore[return-value]


def _kv_slots(random: Random, heads: Heads, tokens: int, padding: int) -> tuple[torch.Tensor, int]:
    """Distinct slots outside page 0; padding tokens share page 0's first. Also the pages needed."""
    pages = 2 + -(-tokens // heads.page)
    slots = heads.page + random.permutation((pages - 1) * heads.page)[:tokens]
    slots[tokens - padding :] = 0
    return slots.int(), pages


def _new_tokens() -> Iterator[tuple[Heads, int, int, str, str]]:
    for heads, (act, cache) in itertools.product(GEOMETRIES, ACT_AND_CACHE):
        for tokens, padding in ((5, 2), (1, 0), (heads.page, 0), (heads.page + 1, 1)):
            yield heads, tokens, min(padding, tokens), act, cache


def kv_write(op: str) -> Iterator[Case]:
    for seed, (heads, tokens, padding, act, cache) in enumerate(_new_tokens()):
        random = Random(seed)
        k, v = (random.normal(tokens, heads.kv_heads * heads.size, dtype=act) for _ in range(2))
        kv_slot, pages = _kv_slots(random, heads, tokens, padding)
        k_cache, v_cache = _caches(random, heads, pages, cache)
        operands = {"k": k, "v": v, "kv_slot": kv_slot, "k_cache": k_cache, "v_cache": v_cache}
        attrs = {"kv_heads": heads.kv_heads, "head_dim": heads.size}
        label = f"{heads.label}-{tokens}-{act}-{cache}"
        if padding > 1:  # which of several lands on the null page is nobody's business: give them all one
            k[-padding:], v[-padding:] = k[-1].clone(), v[-1].clone()
        yield Case(op, label, operands, attrs)
        yield Case(op, f"{label}-columns", operands | {"k": in_columns(k), "v": in_columns(v)}, attrs)


def norm_rope_kv_write(op: str) -> Iterator[Case]:
    for seed, (heads, tokens, padding, act, cache) in enumerate(_new_tokens()):
        random = Random(seed)
        qkv = random.normal(tokens, (heads.heads + 2 * heads.kv_heads) * heads.size, dtype=act)
        kv_slot, pages = _kv_slots(random, heads, tokens, padding)
        k_cache, v_cache = _caches(random, heads, pages, cache)
        # Whole heads and, as partial rotary does, a quarter of them.
        for rotary, normed in ((heads.size, False), (heads.size // 4, True), (heads.size, True)):
            rows = random.rotary(tokens, rotary)
            if padding > 1:
                qkv[-padding:], rows[-padding:] = qkv[-1].clone(), rows[-1].clone()
            operands = {"qkv": qkv, "rows": rows, "kv_slot": kv_slot, "k_cache": k_cache, "v_cache": v_cache}
            if normed:
                operands["q_norm"] = random.uniform(heads.size, dtype=act)
                operands["k_norm"] = random.uniform(heads.size, dtype=act)
            attrs = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size, "eps": 1e-6}
            yield Case(op, f"{heads.label}-{tokens}-Q{rotary}-{normed}-{act}-{cache}", operands, attrs)


def filled_cache(
    random: Random, heads: Heads, lengths: Sequence[int], dtype: str, spare_columns: int = 1
) -> dict[str, torch.Tensor]:
    """Caches in which row r's first ``lengths[r]`` tokens are random and everything else is NaN.

    Pages are shuffled; table entries behind a row's last page are the null page, or, in odd rows, a page
    that nobody wrote.
    """
    needed = [-(-length // heads.page) for length in lengths]
    pages = 2 + sum(needed)
    k_cache, v_cache = _caches(random, heads, pages, dtype)
    order = (random.permutation(pages - 2) + 1).tolist()
    table = torch.zeros(len(lengths), max(needed) + spare_columns, dtype=torch.int32)
    for r, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r] = (pages - 1) * (r % 2) if length else 0
        table[r, :count] = int32(mine)
        for cache in (k_cache, v_cache):
            rows = torch.full((count * heads.page, heads.kv_heads, heads.size), NAN, dtype=cache.dtype)
            rows[:length] = random.normal(length, heads.kv_heads, heads.size, dtype=dtype)
            cache[torch.tensor(mine, dtype=torch.int64)] = rows.view(count, *cache.shape[1:])
    return {"k_cache": k_cache, "v_cache": v_cache, "page_table": table}


def _attention_attrs(heads: Heads, window: int) -> dict[str, Any]:
    made: dict[str, Any] = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size}
    return made | {"scale": heads.size**-0.5, "window": window}


def decode_attention(op: str) -> Iterator[Case]:
    for seed, (heads, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = heads.page
        batches = [
            [2 * page + 3, 1, page],
            [1],
            [page - 1 or 1, page, page + 1, 0, 0],
            [0, 5, 0],
            [0],
            [40] * 8,
        ]
        for at, lengths in enumerate(batches):
            window = (0, 4)[(at + seed) % 2]  # over the seeds every batch meets both
            random = Random(seed)
            operands = {"q": random.normal(len(lengths), heads.heads * heads.size, dtype=act)}
            operands |= filled_cache(random, heads, lengths, cache)
            operands["context_len"] = int32(lengths)
            label = f"{heads.label}-{lengths}-w{window}-{act}-{cache}".replace(" ", "")
            yield Case(op, label, operands, _attention_attrs(heads, window))


def extend_attention(op: str) -> Iterator[Case]:
    for seed, (heads, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = heads.page
        # (new tokens, tokens of context with them) of every row; tokens of no row follow.
        batches = [
            [(3, 2 * page + 3), (page + 1, page + 1), (1, page)],
            [(1, 1)],
            [(page, page), (1, page + 1), (0, 0), (page + 1, 2 * page + 1), (0, 0)],
            [(0, 0), (2, 7)],
            [(0, 0)],
        ]
        for at, batch in enumerate(batches):
            window, spare = ((0, 3), (4, 3), (0, 0), (4, 0))[(at + seed) % 4]
            counts, lengths = [n for n, _ in batch], [length for _, length in batch]
            starts = [sum(counts[:r]) if n else 0 for r, n in enumerate(counts)]
            random = Random(seed)
            tokens = max(1, sum(counts)) + spare
            operands = {"q": random.normal(tokens, heads.heads * heads.size, dtype=act)}
            operands["q"][sum(counts) :] = NAN
            operands |= filled_cache(random, heads, lengths, cache)
            operands |= {
                "query_start": int32(starts),
                "query_len": int32(counts),
                "context_len": int32(lengths),
            }
            label = f"{heads.label}-{batch}-w{window}-{act}-{cache}".replace(" ", "")
            yield Case(op, label, operands, _attention_attrs(heads, window))


def sample(op: str) -> Iterator[Case]:
    for rows, vocabulary, context in ((3, 17, 9), (1, 1, 2), (4, 1031, 12)):
        for sampled in (False, True):
            random = Random(rows)
            slots = rows + 2
            full = torch.ones(slots)
            operands = {
                "logits": random.normal(rows, vocabulary, scale=3),
                "row_slot": random.permutation(slots - 1)[:rows].int(),
                "context_len": random.integers(context, rows).clamp_min(1),
                "history": random.integers(vocabulary, slots, context),
                "prompt_len": torch.ones(slots, dtype=torch.int32),
                "temperature": full * (0.8 if sampled else 0.0),
                "top_k": random.integers(6, slots),
                "top_p": full * 0.9,
                "min_p": full * 0.02,
                "presence_penalty": full * 0.3,
                "frequency_penalty": full * 0.2,
                "repetition_penalty": full * 1.2,
                "seed": torch.arange(slots, dtype=torch.int64),
                "min_new_tokens": random.integers(3, slots),
                "stop_ids": random.integers(vocabulary + 1, slots, 2) - 1,
                "bias_ids": torch.full((slots, 3), -1, dtype=torch.int32),
                "bias_values": random.normal(slots, 3),
            }
            operands["bias_ids"][:, 0] = random.integers(vocabulary, slots)
            if rows > 2:
                operands["row_slot"][-1] = slots - 1  # a padding row
            yield Case(op, f"{rows}x{vocabulary}-{sampled}", operands)


def token_logprobs(op: str) -> Iterator[Case]:
    for rows, vocabulary, most in ((3, 17, 4), (1, 1, 2), (4, 1031, 20), (2, 3, 8)):
        random = Random(rows)
        operands = {
            "logits": random.normal(rows, vocabulary, scale=4),
            "tokens": random.integers(vocabulary, rows),
            "row_slot": random.permutation(rows).int(),
            "top_logprobs": random.integers(most + 3, rows + 1) - 1,
        }
        operands["top_logprobs"][-1] = -1
        yield Case(op, f"{rows}x{vocabulary}-{most}", operands, {"max_top": most})


BUILDERS: Mapping[str, Callable[[str], Iterator[Case]]] = {
    "add": lambda op: _pointwise(op, "x", "y"),
    "multiply": lambda op: _pointwise(op, "x", "y"),
    "silu": lambda op: _pointwise(op, "x"),
    "silu_mul": lambda op: _pointwise(op, "gate_up", even=True),
    "columns": columns,
    "gather_last": gather_last,
    "load_tokens": load_tokens,
    "embedding": embedding,
    "linear": linear,
    "rms_norm": lambda op: _norm(op, "x"),
    "add_rms_norm": lambda op: _norm(op, "x", "residual"),
    "quantize_fp8": lambda op: _grouped(_pointwise(op, "x"), _width("x")),
    "quantize_fp8_static": quantize_fp8_static,
    "quantize_fp8_block": quantize_fp8_block,
    "rms_norm_quantize_fp8": lambda op: _grouped(_norm(op, "x"), _width("x")),
    "add_rms_norm_quantize_fp8": lambda op: _grouped(_norm(op, "x", "residual"), _width("x")),
    "silu_mul_quantize_fp8": lambda op: _grouped(_pointwise(op, "gate_up", even=True), _width("gate_up", 2)),
    "linear_fp8": linear_fp8,
    "linear_fp8_block": linear_fp8_block,
    "head_rms_norm": head_rms_norm,
    "rope_rows": rope_rows,
    "rope_rows_dynamic": rope_rows_dynamic,
    "rope": rope,
    "kv_write": kv_write,
    "norm_rope_kv_write": norm_rope_kv_write,
    "decode_attention": decode_attention,
    "extend_attention": extend_attention,
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
