"""The sampler's noise: published test values, uniformity, independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from makeready.kernels.sample.noise import exponential_noise, fmix32, mix64, noise_bits, noise_key

COUNT = 1 << 14
IDS = torch.arange(COUNT)
BIT = 1 << np.arange(32)


def test_published_values():
    # First outputs of SplitMix64 seeded with 0, and of MurmurHash3's finaliser.
    golden = 0x9E3779B97F4A7C15
    assert mix64(golden) == 0xE220A8397B1DCDAF
    assert mix64(2 * golden) == 0x6E789E6AA1B965F4
    assert fmix32(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]


def test_keys_differ():
    seeds = [*range(-300, 300), 2**63 - 1, -(2**63), 2**32, 2**32 + 1]
    keys = {noise_key(seed, position) for seed in seeds for position in range(300)}
    assert len(keys) == len(seeds) * 300
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (0, 1), (1, 0), (-1, 7), (2**63 - 1, 131071)])
def test_bits_are_uniform(seed, position):
    bits = noise_bits(seed, position, IDS).numpy()
    assert bits.min() >= 0
    assert bits.max() < 2**32
    ones = ((bits[:, None] & BIT) != 0).mean(0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / math.sqrt(COUNT)
    for shift in (0, 12, 24):
        counts = np.bincount(bits >> shift & 255, minlength=256)
        statistic = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
        assert abs(statistic - 255) < 4.5 * math.sqrt(2 * 255)


def neighbours():
    """Pairs of streams that differ in one input by one step or one bit."""
    for seed, position in ((0, 0), (12345, 678)):
        base = noise_bits(seed, position, IDS)
        yield base[:-1], base[1:]
        for bit in (0, 1, 4, 8, 15):
            yield base, noise_bits(seed, position, IDS ^ (1 << bit))
            yield base, noise_bits(seed, position ^ (1 << bit), IDS)
            yield base, noise_bits(seed ^ (1 << bit), position, IDS)
        yield base, noise_bits(seed ^ (1 << 62), position, IDS)
        yield base, noise_bits(seed + 1, position - 1 if position else 1, IDS)


def test_neighbouring_tokens_positions_and_seeds_are_independent():
    for left, right in neighbours():
        a, b = (x.double().numpy() for x in (left, right))
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(COUNT)
        # Half of the bits flip, each of them half of the time.
        flipped = ((left ^ right).numpy()[:, None] & BIT) != 0
        assert np.abs(flipped.mean(0) - 0.5).max() < 6 * 0.5 / math.sqrt(COUNT)


def test_winners_of_successive_positions_are_independent():
    uniform = torch.tensor([int(exponential_noise(3, p, IDS[:1000]).argmin()) for p in range(2000)]) / 1000
    assert abs(uniform.mean() - 0.5) < 4.5 / math.sqrt(12 * 2000)
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 4.5 / math.sqrt(2000)


def test_noise_is_exponential():
    noise = exponential_noise(5, 9, IDS).double().sort().values.numpy()
    # Kolmogorov-Smirnov distance to 1 - exp(-x).
    distance = np.abs(-np.expm1(-noise) - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 2.0 / math.sqrt(COUNT)


def test_smallest_and_largest_noise_are_finite_and_exact():
    def inverse(x):
        x ^= x >> 16
        x = x * pow(0xC2B2AE35, -1, 2**32) % 2**32
        x ^= x >> 13 ^ x >> 26
        x = x * pow(0x85EBCA6B, -1, 2**32) % 2**32
        return x ^ x >> 16

    key = noise_key(1, 2)
    low, high = key % 2**32, key >> 32
    wanted = [0, 1, 2**32 - 1, 2**31]
    ids = torch.tensor([inverse(inverse(bits) ^ high) ^ low for bits in wanted])
    assert noise_bits(1, 2, ids).tolist() == wanted
    got = exponential_noise(1, 2, ids)
    assert got.dtype == torch.float32
    want = [-math.log1p(-min((bits + 0.5) / 2**32, 1 - 2.0**-24)) for bits in wanted]
    torch.testing.assert_close(got, torch.tensor(want), rtol=3e-7, atol=0)
