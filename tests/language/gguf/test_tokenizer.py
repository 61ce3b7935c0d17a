"""Tokenizers made from the metadata of GGUF files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from models.errors import ModelError
from models.language.gguf.splits import SPLITS
from models.language.gguf.stop_tokens import stop_token_ids
from models.language.gguf.tokenizer import build_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PATH = Path("model.gguf")
TEXTS = [
    "Hello world, it's 12345 o'clock",
    "你好，世界！",
    "I've 'LL we'Re",
    "a  b   c\n\n  d\t\te \n",
    "x=1;y_2 //é 🚀",
    "ABCdef Ghi \uff11\uff12 ½",
]


def byte_level(
    pre: str | None = "gpt-2", extra: Mapping[str, int] = {}, values: Mapping[str, Any] = {}
) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes, a few merges, and extra tokens of the types given."""
    merges = ["l o", "lo w", "Ġ low", "1 2"]
    merged = ["lo", "low", "Ġlow", "12"]
    tokens = [*BYTES, *merged, *extra]
    kinds: list[int] = [TokenType.NORMAL] * (len(BYTES) + len(merged)) + [*extra.values()]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }
    return build_tokenizer(PATH, metadata | dict(values))


def sentencepiece(**values: Any) -> PreTrainedTokenizerBase:
    """A tokenizer of scores; `lo` is better than `ow`, so `low` is `lo` and `w`."""
    tokens = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x0A>": 6, "<0xC3>": 6, "<0xA9>": 6, "<|end|>": 3, "  ": 4, "\n": 4}
    pieces = ["▁", "l", "o", "w", "e", "r", "lo", "ow", "er", "▁lo", "ower"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces],
        "tokenizer.ggml.token_type": [*tokens.values(), *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return build_tokenizer(PATH, metadata | values)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))]


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """What a text is split into before bytes are merged."""
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


# Byte-level


@pytest.mark.parametrize("text", TEXTS)
def test_gpt_2_splits_as_the_tokenizers_package_does(text: str) -> None:
    expected = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pieces(byte_level("gpt-2"), text) == [piece for piece, _ in expected.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_digits_first_as_the_tokenizers_package_does(text: str) -> None:
    expected = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert pieces(byte_level("smollm"), text) == [piece for piece, _ in expected.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["It", "'S", "Ġ", "123", "45", "!!ĊĊ", "Ġx"]),
        ("qwen2", ["It", "'S", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ", "Ġx"]),
        ("tekken", ["It", "'S", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ", "Ġx"]),
        ("gpt-4o", ["It'S", "Ġ", "123", "45", "!!ĊĊ", "Ġx"]),
        ("gpt-2", ["It", "'", "S", "Ġ12345", "!!", "ĊĊ", "Ġx"]),
        ("smollm", ["It", "'", "S", "Ġ", "1", "2", "3", "4", "5", "!!", "ĊĊ", "Ġx"]),
        ("deepseek-v3", ["It", "'S", "Ġ", "123", "45", "!!ĊĊ", "Ġx"]),
        ("bloom", ["It'S", "Ġ12345", "!!ĊĊ", "Ġx"]),
    ],
)
def test_words_and_numbers_are_split_by_the_name_in_the_file(pre: str, expected: list[str]) -> None:
    assert pieces(byte_level(pre), "It'S 12345!!\n\n x") == expected


@pytest.mark.parametrize("pre", SPLITS)
def test_each_split_keeps_every_character(pre: str) -> None:
    tokenizer = byte_level(pre)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        for expression in SPLITS[pre]:
            Regex(expression)


def test_a_split_that_is_unknown_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "parley"):
        tokenizer = byte_level("of-tomorrow")
    assert "splits text in a way that is unknown here (of-tomorrow)" in caplog.text
    assert pieces(tokenizer, "a 12345") == pieces(byte_level("default"), "a 12345")


def test_an_old_file_without_the_name_splits_as_its_architecture_does() -> None:
    tokenizer = byte_level(None, values={"general.architecture": "qwen2"})
    assert pieces(tokenizer, "123") == ["1", "2", "3"]


def test_merges_are_applied_in_their_order() -> None:
    assert tokens_of(byte_level(), "low low 12") == ["low", "Ġlow", "Ġ", "12"]


def test_digits_that_are_split_are_not_merged() -> None:
    assert tokens_of(byte_level("smollm"), "12") == ["1", "2"]


def test_a_whole_word_is_a_token_for_llama_3_though_no_merges_lead_to_it() -> None:
    extra = {"word": TokenType.NORMAL}
    assert tokens_of(byte_level("llama-bpe", extra), "word") == ["word"]
    assert tokens_of(byte_level("gpt-2", extra), "word") == ["w", "o", "r", "d"]


def test_an_accent_apart_from_its_letter_is_composed_first_for_qwen() -> None:
    assert byte_level("qwen2").encode("e\u0301") == byte_level("qwen2").encode("é")
    assert byte_level("gpt-2").encode("e\u0301") != byte_level("gpt-2").encode("é")


def test_tokens_of_templates_and_added_ones_are_matched_whole() -> None:
    tokenizer = byte_level(extra={"<|im_start|>": TokenType.CONTROL, "<think>": TokenType.USER_DEFINED})
    assert tokens_of(tokenizer, "<|im_start|>low<think>") == ["<|im_start|>", "low", "<think>"]
    ids = tokenizer.encode("<|im_start|>low<think>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "low<think>"


def test_a_token_of_templates_in_what_a_user_writes_is_only_text() -> None:
    tokenizer = byte_level(extra={"<|im_start|>": TokenType.CONTROL})
    ids = tokenizer.encode("<|im_start|>", split_special_tokens=True)
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "<|im_start|>"


def test_an_end_of_turn_that_the_file_calls_normal_is_a_token_of_templates() -> None:
    tokenizer = byte_level(extra={"<|im_end|>": TokenType.NORMAL})
    assert tokens_of(tokenizer, "low<|im_end|>") == ["low", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("low<|im_end|>"), skip_special_tokens=True) == "low"


def test_added_tokens_with_chinese_signs_are_decoded_as_they_are() -> None:
    tokenizer = byte_level(extra={"<\uff5cUser\uff5c>": TokenType.CONTROL, "你": TokenType.USER_DEFINED})
    assert tokenizer.decode(tokenizer.encode("<\uff5cUser\uff5c>low你好")) == "<\uff5cUser\uff5c>low你好"


def test_a_text_begins_and_ends_with_the_tokens_that_the_file_wants() -> None:
    extra = {"<bos>": TokenType.CONTROL, "<eos>": TokenType.CONTROL}
    ids = {"tokenizer.ggml.bos_token_id": len(BYTES) + 4, "tokenizer.ggml.eos_token_id": len(BYTES) + 5}
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    low = len(BYTES) + 1
    assert byte_level("gpt-2", extra, ids).encode("low") == [low]
    assert byte_level("llama-bpe", extra, ids).encode("low") == [len(BYTES) + 4, low]
    neither = byte_level("llama-bpe", extra, ids | {"tokenizer.ggml.add_bos_token": False})
    assert neither.encode("low") == [low]
    tokenizer = byte_level("gpt-2", extra, ids | both)
    assert tokenizer.encode("low") == [len(BYTES) + 4, low, len(BYTES) + 5]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


# Of SentencePiece's kind


def test_the_best_score_is_merged_first() -> None:
    assert tokens_of(sentencepiece(), "lower") == ["▁lo", "w", "er"]
    assert tokens_of(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}), "lower") == ["lo", "w", "er"]


def test_equal_scores_are_merged_in_the_order_of_the_tokens_and_spaces_last() -> None:
    tokens = ["<unk>", "▁", "▁▁", "l", "▁l"]
    tokenizer = build_tokenizer(
        PATH,
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 1, 1, 1, 1],
            "tokenizer.ggml.scores": [-1000.0] * 5,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": False,
        },
    )
    assert tokens_of(tokenizer, " l") == ["▁", "▁l"]


def test_a_character_without_a_token_becomes_bytes_and_comes_back() -> None:
    tokenizer = sentencepiece()
    assert tokens_of(tokenizer, "loé") == ["▁lo", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("loé", add_special_tokens=False)) == "loé"


def test_runs_of_spaces_that_are_tokens_are_matched_whole() -> None:
    tokenizer = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})
    assert tokens_of(tokenizer, "lo  lo\nlo") == ["lo", "  ", "lo", "\n", "lo"]
    assert tokenizer.decode(tokenizer.encode("lo  lo\nlo", add_special_tokens=False)) == "lo  lo\nlo"


def test_a_space_comes_before_the_first_word_and_after_a_token_of_templates() -> None:
    assert tokens_of(sentencepiece(), "lo<|end|>lo") == ["▁lo", "<|end|>", "▁lo"]


def test_it_begins_with_its_token_unless_the_file_says_otherwise() -> None:
    assert sentencepiece().encode("lo")[0] == 1
    assert sentencepiece(**{"tokenizer.ggml.add_bos_token": False}).encode("lo")[0] != 1


def test_spaces_after_a_token_of_phi_3_belong_to_it() -> None:
    tokenizer = sentencepiece(**{"general.name": "Phi 3 Mini", "tokenizer.ggml.add_space_prefix": False})
    assert tokens_of(tokenizer, "<|end|> lo") == ["<|end|>", "▁lo"]
    tokenizer = sentencepiece(**{"general.name": "Phi-3-mini", "tokenizer.ggml.add_space_prefix": False})
    assert tokens_of(tokenizer, "<|end|> lo") == ["<|end|>", "lo"]


def test_tokens_without_scores_are_refused() -> None:
    with pytest.raises(ModelError, match="its tokens have no scores"):
        sentencepiece(**{"tokenizer.ggml.scores": None})


# Both


@pytest.mark.parametrize("kind", ["rwkv", "bert", "t5", "none"])
def test_a_kind_of_tokenizer_that_is_unknown_is_named(kind: str) -> None:
    with pytest.raises(ModelError, match=f"cannot make a tokenizer of the kind {kind}: use a folder of the model"):
        byte_level(values={"tokenizer.ggml.model": kind})


def test_a_file_without_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        build_tokenizer(PATH, {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"})


def test_a_token_that_is_there_twice_is_the_first_one() -> None:
    tokenizer = byte_level(extra={"<|x|>": TokenType.CONTROL})
    twice = byte_level(
        values={
            "tokenizer.ggml.tokens": [*BYTES, "lo", "low", "Ġlow", "12", "<|x|>", "<|x|>", ""],
            "tokenizer.ggml.token_type": [1] * (len(BYTES) + 4) + [3, 3, 3],
        }
    )
    assert twice.encode("low<|x|>") == tokenizer.encode("low<|x|>")


def test_the_chat_template_is_the_default_one_and_one_for_tools_is_beside_it() -> None:
    assert byte_level().chat_template is None
    assert byte_level(values={"tokenizer.chat_template": "A"}).chat_template == "A"
    named = {
        "tokenizer.chat_template": "A",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "B",
    }
    tokenizer = byte_level(values=named)
    assert tokenizer.chat_template == {"default": "A", "tool_use": "B"}
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "A"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}], tokenize=False) == "B"


# Where replies end


def stops(tokens: list[str], **ids: int) -> set[str]:
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()},
    }
    return {tokens[index] for index in stop_token_ids(metadata)}


def test_replies_end_at_the_three_tokens_that_the_file_names() -> None:
    assert stops(["a", "b", "c", "d"], eos=0, eot=1, eom=2) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<bos>", "<eos>", "<end_of_turn>", "</s>", "<start_of_turn>"], {"<eos>", "<end_of_turn>"}),  # Gemma
        (["<s>", "</s>", "<|end|>", "<|endoftext|>", "<|user|>"], {"</s>", "<|end|>", "<|endoftext|>"}),  # Phi-3
        (
            ["<|eot_id|>", "</s>", "<|eom_id|>", "<|end_of_text|>"],
            {"<|eot_id|>", "</s>", "<|eom_id|>", "<|end_of_text|>"},
        ),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], {"<|im_end|>", "<|endoftext|>"}),
    ],
)
def test_replies_end_at_tokens_of_known_names(tokens: list[str], ends: set[str]) -> None:
    assert stops(tokens, eos=1) == ends


def test_the_end_of_a_message_of_gpt_oss_does_not_end_the_reply() -> None:
    tokens = ["<|return|>", "<|call|>", "<|end|>"]
    assert stops(tokens, eos=0, eot=2) == {"<|return|>", "<|call|>"}


def test_an_id_beyond_the_vocabulary_is_left_out() -> None:
    assert stops(["a", "b"], eos=1, eot=7) == {"b"}
