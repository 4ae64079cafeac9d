r"""How byte-level BPE vocabularies split text before merging, by the names that GGUF files use.

The patterns are part of each vocabulary's format (a text must be split as it was in training): GPT-2's,
Llama 3's, Qwen2's, DeepSeek's and Mistral's published tokenizer.json files state them. Those of `default` are
llama.cpp's. `\p{..}` are Unicode classes
of the Oniguruma engine inside `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = (rf"{_WORDS}|\p{{N}}|{_REST}",)
_LLAMA3_SPLIT = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN_SPLIT = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# One after the other: punctuation, GPT-2's words, numbers, and of these three digits at a time.
_DEFAULT_SPLIT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

_DEEPSEEK_V3_SPLIT = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, Hiragana, Katakana
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# First and last code point of each stretch of cased letters that DeepSeek LLM's pattern lists. It is an
# older Unicode's list without the mathematical alphabets, so \p{Lu}\p{Ll}\p{Lt} would not do.
_CASED = """
41-5A 61-7A B5-B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F-37F 386-386
388-38A 38C-38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59-1F59 1F5B-1F5B
1F5D-1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE-1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC
1FF2-1FF4 1FF6-1FFC 2102-2102 2107-2107 210A-2113 2115-2115 2119-211D 2124-2124 2126-2126 2128-2128
212A-212D 212F-2134 2139-2139 213C-213F 2145-2149 214E-214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE
2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A
FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_CASED_CLASS = "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED.split())
_DEEPSEEK_LLM_SPLIT = (
    "[\r\n]",
    rf"\s?[{_CASED_CLASS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",  # punctuation of ASCII, CJK
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",  # what lies between Samaritan and Hangul
)


def split_then_bytes(
    patterns: Sequence[str], *, add_prefix_space: bool = False, digits: bool = False
) -> pre_tokenizers.PreTokenizer:
    """Isolate what each pattern matches, one pattern after the other, then write bytes as characters.

    Args:
        patterns: Oniguruma patterns.
        add_prefix_space: put a space before a text that begins with none.
        digits: isolate every digit after the patterns.
    """
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns
    ]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


@dataclass(frozen=True)
class ByteLevelKind:
    """How one family of byte-level vocabularies treats text.

    Attributes:
        pre_tokenizer: makes the pre-tokenizer.
        normalizer: makes the normalizer, None for no normalization.
        ignore_merges: a piece that is in the vocabulary is one token whatever the merges say.
        add_bos: bos is added where the file says nothing.
    """

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = ByteLevelKind(_gpt2)
_LLAMA3 = ByteLevelKind(lambda: split_then_bytes(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_QWEN2 = ByteLevelKind(lambda: split_then_bytes(QWEN2_SPLIT), normalizer=normalizers.NFC)

DEFAULT = "default"  # of files that do not say how text is split
# Values of `tokenizer.ggml.pre`.
BYTE_LEVEL_KINDS: dict[str, ByteLevelKind] = {
    DEFAULT: ByteLevelKind(lambda: split_then_bytes(_DEFAULT_SPLIT)),
    "gpt-2": _GPT2,
    "smollm": ByteLevelKind(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-llm": ByteLevelKind(lambda: split_then_bytes(_DEEPSEEK_LLM_SPLIT, digits=True)),
    "deepseek-v3": ByteLevelKind(lambda: split_then_bytes(_DEEPSEEK_V3_SPLIT)),
    "tekken": ByteLevelKind(lambda: split_then_bytes(_TEKKEN_SPLIT), ignore_merges=True, add_bos=True),
}
