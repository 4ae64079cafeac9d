"""Steps of extend attention in Gluon, with products under way while exponentials are computed.

# M query vectors of half a tile, L keys of a step, D head size
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from makeready.kernels.attention.extend_items_triton import keys_of

M = gl.constexpr(64)  # rows of a warpgroup's matrix instruction
L = gl.constexpr(128)
RUN = gl.constexpr(64)  # keys of a copy, all in one page


@gluon.jit
def weighted_values(
    rings, barriers, scale, step, items, position, length, low, shut, high, HALF: gl.constexpr,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Running maxima, sums of exponentials and of values over the keys ``low : high``.

    Args:
        step, items: steps and items that the rings have seen before.
        position: of the first query vector's token.
        shut: keys before this one are seen by all.
    """
    q_ring, k_ring, v_ring = rings
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    q_MD = q_ring.index(HALF)
    scores: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, L, 16]
    )
    values: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    steps = gl.cdiv(high - low, L)
    masked = gl.maximum(steps - (shut - low) // L, 1)
    key = low + (steps - 1) * L
    max_M = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    sum_M = gl.zeros([M], gl.float32, gl.SliceLayout(1, scores))
    acc_MD = gl.zeros([M, HEAD_DIM], gl.float32, values)

    mbarrier.wait(q_full.index(HALF), items & 1)
    mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
    score_ML = _scores(q_MD, k_ring, step, scores, STAGES)
    score_ML = warpgroup_mma_wait(0, deps=[score_ML])
    mbarrier.arrive(k_free.index(step % STAGES), count=1)
    score_ML = _hidden(score_ML, key, position, length, GROUP, scores)
    p_ML, _shrink_M, max_M, sum_M = _weights(score_ML, scale, max_M, sum_M, True)
    p_ML = gl.convert_layout(p_ML.to(v_ring.dtype), operand)
    mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, steps > 1)
    for i in range(1, masked):
        key -= L
        step += 1
        p_ML, max_M, sum_M, acc_MD = _step(
            q_MD, k_ring, v_ring, barriers, p_ML, max_M, sum_M, acc_MD, scale, step, i + 1 < steps,
            key, position, length, GROUP, True, scores, values, STAGES,
        )  # fmt: skip
    for i in range(masked, steps):
        step += 1
        p_ML, max_M, sum_M, acc_MD = _step(
            q_MD, k_ring, v_ring, barriers, p_ML, max_M, sum_M, acc_MD, scale, step, i + 1 < steps,
            key, position, length, GROUP, False, scores, values, STAGES,
        )  # fmt: skip
    mbarrier.arrive(q_free.index(HALF), count=1)
    acc_MD = _values(p_ML, v_ring, v_full, acc_MD, step, STAGES)
    acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
    mbarrier.arrive(v_free.index(step % STAGES), count=1)
    rows: gl.constexpr = gl.SliceLayout(1, values)
    return gl.convert_layout(max_M, rows), gl.convert_layout(sum_M, rows), acc_MD


@gluon.jit
def _step(
    q_MD, k_ring, v_ring, barriers, p_ML, max_M, sum_M, acc_MD, scale, step, more, key, position, length,
    GROUP: gl.constexpr, MASKED: gl.constexpr, scores: gl.constexpr, values: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Weights of ``step``, whose keys are there, while the weighted values of the step before are added.

    Args:
        more: whether there is a step behind this one, whose keys are waited for.
    """
    _, _, k_full, k_free, v_full, v_free = barriers
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    score_ML = _scores(q_MD, k_ring, step, scores, STAGES)
    acc_MD = _values(p_ML, v_ring, v_full, acc_MD, step - 1, STAGES)
    score_ML = warpgroup_mma_wait(1, deps=[score_ML])
    mbarrier.arrive(k_free.index(step % STAGES), count=1)
    if MASKED:
        score_ML = _hidden(score_ML, key, position, length, GROUP, scores)
    p_ML, shrink_M, max_M, sum_M = _weights(score_ML, scale, max_M, sum_M, MASKED)
    p_ML = gl.convert_layout(p_ML.to(v_ring.dtype), operand)
    # Here, and not before the product: the assembler moves the wait for the values up across the weights, but
    # not across a loop.
    mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, more)
    acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
    mbarrier.arrive(v_free.index((step - 1) % STAGES), count=1)
    return p_ML, max_M, sum_M, acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, values))[:, None]


@gluon.jit
def _scores(q_MD, k_ring, step, scores: gl.constexpr, STAGES: gl.constexpr):
    """Queries times the keys of ``step``, begun."""
    none_ML = gl.zeros([M, L], gl.float32, scores)
    return warpgroup_mma(
        q_MD, k_ring.index(step % STAGES).permute((1, 0)), none_ML, use_acc=False, is_async=True
    )


@gluon.jit
def _values(p_ML, v_ring, v_full, acc_MD, step, STAGES: gl.constexpr):
    """``acc_MD`` plus the weighted values of ``step``, begun."""
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(p_ML, v_ring.index(stage), acc_MD, is_async=True)


@gluon.jit
def _hidden(score_ML, key, position, length, GROUP: gl.constexpr, scores: gl.constexpr):
    """Scores of the step from ``key`` on; minus infinity where the token of a query vector sees no key."""
    l = gl.arange(0, L, gl.SliceLayout(0, scores))  # noqa: E741
    m = gl.arange(0, M, gl.SliceLayout(1, scores))
    key_L, is_key_L = keys_of(key, length, l, RUN)
    seen_ML = (key_L[None, :] <= (position + m // GROUP)[:, None]) & is_key_L[None, :]
    return gl.where(seen_ML, score_ML, float("-inf"))


@gluon.jit
def _weights(score_ML, scale, max_M, sum_M, MASKED: gl.constexpr):
    """Exponentials over the new maxima, what sums so far shrink by, and new maxima and sums."""
    higher_M = gl.maximum(max_M, gl.max(score_ML, 1) * scale)
    base_M = higher_M
    if MASKED:
        base_M = gl.where(higher_M == float("-inf"), 0.0, higher_M)  # nothing seen yet
    p_ML = gl.exp2(score_ML * scale - base_M[:, None])
    shrink_M = gl.exp2(max_M - base_M)
    return p_ML, shrink_M, higher_M, sum_M * shrink_M + gl.sum(p_ML, 1)
