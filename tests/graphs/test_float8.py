"""8-bit floats made without PyTorch are its bytes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from makeready.graphs.checkpoint.float8 import to_float8

FP8 = torch.float8_e4m3fn


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_8_bit_bytes_are_pytorchs(values):
    x = torch.tensor(values, dtype=torch.float32)
    wanted = x.clamp(-448, 448).to(FP8).view(torch.uint8)
    made = torch.from_numpy(to_float8(x.numpy()))
    nan = x.isnan()
    assert torch.equal(made[~nan], wanted[~nan])
    assert (made[nan] & 0x7F == 0x7F).all()


def test_every_8_bit_number_and_the_middles_between_them():
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(FP8).float()
    number = ~values.isnan()
    assert torch.equal(torch.from_numpy(to_float8(values.numpy()))[number], every[number])
    line = values[number].unique()
    middle = (line[1:] + line[:-1]) / 2
    for x in (middle, torch.nextafter(middle, line[1:]), torch.nextafter(middle, line[:-1])):
        assert torch.equal(torch.from_numpy(to_float8(x.numpy())), x.to(FP8).view(torch.uint8))
