"""What rounding costs the chunk kernel: a plain model of chunk_triton.py, in its order, with operands rounded as its
products take them; on keys that are nearly equal or alike but for their sign, almost without decay and with beta near
1, where most cancels. Interpreted in fp16, the kernel gives what the model gives; of bf16 the model tells alone.

N tokens of a chunk, K, V features of a key and a value, X sequences
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from case import Case, int32

from makeready.kernels.delta.rule import CHUNK, EPS

BLOCK = 16
LOWER = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits behind the point, as tensor cores take fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def inverse_of(l_XNN: torch.Tensor, exact: bool) -> torch.Tensor:
    """``(I + L)^-1``; its blocks on the diagonal in fp32, the others by products."""
    product = torch.matmul if exact else (lambda a, b: tf32(a) @ tf32(b))
    e_XNN, off_XNN = torch.zeros_like(l_XNN), l_XNN.clone()
    for at in range(0, CHUNK, BLOCK):
        own = slice(at, at + BLOCK)
        made = -l_XNN[:, own, own]
        for j in range(1, BLOCK):
            made[:, j] += (made[:, j, :j, None] * made[:, :j]).sum(1)
        e_XNN[:, own, own] = made + torch.eye(BLOCK)
        off_XNN[:, own, own] = 0
    m_XNN = product(e_XNN, off_XNN)
    inverse = e_XNN
    for _ in range(CHUNK // BLOCK - 1):
        inverse = e_XNN - product(m_XNN, inverse)
    return inverse


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor, s: torch.Tensor,
    dtype: torch.dtype, *, exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Results and states of one head: ``q, k [X, T, K]`` as they are stored, ``g`` the logarithm of the decay."""

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return narrow(x), narrow(x - narrow(x))

    of_q = q.shape[-1] ** -0.5 * torch.rsqrt(q.square().sum(-1) + EPS)
    of_k = torch.rsqrt(k.square().sum(-1) + EPS)
    y = torch.zeros(v.shape)
    for start in range(0, q.shape[1], CHUNK):
        rows = slice(start, start + CHUNK)
        lost = CHUNK - q[:, rows].shape[1]
        qc, kc, vc = (torch.nn.functional.pad(x[:, rows], (0, 0, 0, lost)) for x in (q, k, v))
        bc, gc, fq, fk = (torch.nn.functional.pad(x[:, rows], (0, lost)) for x in (beta, g, of_q, of_k))
        sums = gc.cumsum(-1)
        d = torch.where(LOWER, sums[:, :, None] - sums[:, None], 0.0).exp() * fk[:, None]
        inverse = inverse_of((kc @ kc.mT * d * (bc * fk)[..., None]).tril(-1), exact)
        p = narrow(torch.where(LOWER, qc @ kc.mT * d * fq[..., None], 0.0))
        high, low = halves(s)
        decay = sums.exp()
        known, read = ((x @ low + x @ high) * (f * decay)[..., None] for x, f in ((kc, fk), (qc, fq)))
        wanted = narrow((vc - known) * bc[..., None])
        high, low = halves(inverse)
        u = low @ wanted + high @ wanted
        high, low = halves(u)
        y[:, rows] = (read + p @ low + p @ high)[:, : CHUNK - lost]
        high, low = halves(u * (fk * (sums[:, -1:] - sums).exp())[..., None])
        s = s * decay[:, -1:, None] + kc.mT @ low + kc.mT @ high
    return y, s


def awkward(
    seed: int, tokens: int, noise: float, beta: float, decay: float, signs: bool, asks: str, *, features: int = 128
) -> list[torch.Tensor]:  # fmt: skip
    """Of four sequences: queries, keys, values, beta, logarithms of decays and first states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(4, *shape, generator=generator)

    k = normal(1, features) + noise * normal(tokens, features)
    if signs:
        k[:, ::2] *= -1
    q = normal(tokens, features) if asks == "random" else k
    state = 0.3 * normal(features, 8) * (seed % 2)
    g = -decay * torch.rand(4, tokens, generator=generator)
    return [
        q.bfloat16().float(),
        k.bfloat16().float(),
        normal(tokens, 8),
        torch.full((4, tokens), beta),
        g,
        state,
    ]


CASES = list(
    itertools.product((65, 300), (0.0, 0.01, 0.05, 1.0), (0.5, 0.98, 0.999), (1e-5, 1e-2), (False, True))
)


def operands(x: list[torch.Tensor], one: int, dtype: torch.dtype) -> Case:
    """Sequence ``one`` as a call of the op; gates that come to its beta and its decay."""
    q, k, v, beta, g, state = (part[one] for part in x)
    tokens = len(q)
    a = torch.expm1(-g.double()).log().float()  # softplus(a) = -g, a_log = 0
    made = {
        "qkv": torch.cat((q, k, v), 1).to(dtype),
        "ba": torch.stack((torch.logit(beta.double()).float(), a), 1),
        "a_log": torch.zeros(1),
        "dt_bias": torch.zeros(1),
        "state": torch.stack((0 * state, state))[:, None],
        "state_in": int32([1]),
        "state_out": int32([1]),
        "query_start": int32([0]),
        "query_len": int32([tokens]),
    }
    attrs: dict[str, Any] = {"key_heads": 1, "key_dim": q.shape[1], "value_heads": 1, "value_dim": v.shape[1]}
    return Case("chunk_delta_rule", "awkward", made, attrs)


def off(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.double() - wanted).norm() / wanted.norm())
