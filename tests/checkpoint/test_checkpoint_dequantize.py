"""Block types against the gguf package's own dequantizers, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from checkpoint_files import smollm2, smollm2_reader
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from makeready.graphs.checkpoint import open_checkpoint
from makeready.kernels.gguf_dequantize import BLOCK_TYPES, PIECE, dequantize


def ours(kind: str, raw: np.ndarray, columns: int) -> np.ndarray:
    out = np.full((len(raw), columns), np.nan, np.float32)
    with ThreadPoolExecutor(2) as pool:
        dequantize(kind, raw, out, pool)
    return out


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_random_bytes_dequantize_as_in_gguf(kind):
    elements, size = gguf.GGML_QUANT_SIZES[Kind[kind.upper()]]
    assert BLOCK_TYPES[kind].sizes == (elements, size)
    raw = np.random.default_rng(0).integers(0, 256, (37, 5 * size), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, Kind[kind.upper()])
    assert np.array_equal(ours(kind, raw, 5 * elements), expected, equal_nan=True)


def test_every_scale_and_code_of_mxfp4():
    """Bytes 0-254 as the OCP microscaling format has them: E2M1 codes times 2^(e - 127)."""
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes += [-c for c in codes]
    raw = np.zeros((255, 17), np.uint8)
    raw[:, 0], raw[:, 1:] = np.arange(255), np.arange(16) * 17  # code i in both nibbles of byte i
    with np.errstate(all="ignore"):
        wanted = np.array(codes * 2) * 2.0 ** (np.arange(255)[:, None] - 127)
        assert np.array_equal(ours("mxfp4", raw, 32), wanted.astype(np.float32))


@pytest.mark.parametrize("kind", ["q4_1", "q6_k", "iq4_xs"])
def test_tensors_of_several_pieces_with_a_short_last_one(kind):
    elements, size = BLOCK_TYPES[kind].sizes
    blocks = 2 * PIECE // elements + 3
    raw = np.random.default_rng(1).integers(0, 60, (blocks, size), np.uint8)
    assert np.array_equal(ours(kind, raw, elements), gguf.quants.dequantize(raw, Kind[kind.upper()]))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_quantized_values_come_back_close(kind):
    values = np.random.default_rng(2).standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(values, Kind[kind.upper()])
    steps = {"4": 8, "5": 16, "8": 127}[kind[1]]
    assert np.abs(ours(kind, raw, 256) - values).max() < 1.01 * np.abs(values).max() / steps


def test_smollm2_values_equal_ggufs():
    """Real tensors of both block types; q and k rows are put back as transformers' GGUF loader does it."""
    checkpoint = open_checkpoint(smollm2())
    stored = {tensor.name: tensor for tensor in smollm2_reader().tensors}
    assert len(checkpoint.tensors) == len(stored)
    reorder = LlamaTensorProcessor()._reverse_permute_weights
    layers = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    layers |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    names = {
        f"blk.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in (0, 29) for a, b in layers.items()
    }
    for gguf_name, name in {**names, "token_embd.weight": "model.embed_tokens.weight"}.items():
        tensor = stored[gguf_name]
        rows = slice(0, 500) if "embd" in gguf_name else slice(None)
        expected = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        if "attn_q." in gguf_name:
            expected = reorder(expected, 9, 9)
        if "attn_k." in gguf_name:
            expected = reorder(expected, 9, 3)
        found = checkpoint.read(name)
        assert found.shape == checkpoint.tensors[name].shape == tuple(int(n) for n in tensor.shape[::-1])
        assert np.array_equal(found[rows], expected), name


def test_smollm2_row_ranges_equal_the_whole():
    checkpoint = open_checkpoint(smollm2())
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"):
        whole = checkpoint.read(name)
        for rows in (slice(0, 1), slice(5, 70), slice(575, 576), slice(7, 7)):
            assert np.array_equal(checkpoint.read(name, rows), whole[rows])
