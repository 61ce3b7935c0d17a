"""The tokenizer of a GGUF file: byte-level, or of SentencePiece's kind.

transformers' own reader does not know most names of `tokenizer.ggml.pre`, and takes four times as long.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.errors import ModelError, one_line
from models.language.gguf import splits
from models.language.gguf.stop_tokens import named_stop_tokens

logger = logging.getLogger("parley")

SPACE = "\u2581"
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Vocabulary:
    """The tokens in a file's metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.tokens: list[str] = self.get("tokens", [])
        if not self.tokens:
            raise ModelError(f"{path} has no tokenizer: get another file of the model")
        self.kinds: list[int] = self.get("token_type", [TokenType.NORMAL] * len(self.tokens))
        self.stops = named_stop_tokens(self.tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens) if token}
        if len(self.kinds) < len(self.tokens):
            raise ModelError(f"{path} is broken: it has {len(self.tokens)} tokens, and {len(self.kinds)} have a type")

    def get(self, name: str, default: Any = None) -> Any:
        """A value of `tokenizer.ggml`."""
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def named(self, name: str) -> str | None:
        """The token of a name such as `bos`."""
        token_id = self.get(f"{name}_token_id")
        return self.tokens[token_id] if token_id is not None and token_id < len(self.tokens) else None

    def added(self) -> list[AddedToken]:
        """The tokens that are matched whole: those of templates, and those that the model's makers added."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        # The spaces after Phi-3's tokens belong to them; the file does not say so.
        strips = "phi-3" in self.metadata.get("general.name", "").lower().replace("phi3", "phi-3")
        keeps = ("<unk>", "<s>", "<|endoftext|>")
        return [
            AddedToken(token, normalized=False, special=kind in special or token_id in self.stops,
                       rstrip=strips and token not in keeps)
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=False))
            if token and (kind in special or kind == TokenType.USER_DEFINED or token_id in self.stops)
        ]  # fmt: skip


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template. Raises ModelError for a kind that is unknown."""
    vocabulary = Vocabulary(path, metadata)
    kind = vocabulary.get("model")
    makers = {"gpt2": _from_pairs, "gemma4": _from_pairs, "llama": _from_scores}
    if kind not in makers:
        raise ModelError(f"{path}: Parley cannot make a tokenizer of the kind {kind}: use a folder of the model")
    # transformers copies the tokenizer that it gets, which takes seconds: so it gets an empty one.
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.BPE()), clean_up_tokenization_spaces=False
    )
    try:
        with _no_garbage_collection():
            makers[kind](tokenizer.backend_tokenizer, vocabulary)
        tokenizer.backend_tokenizer.add_tokens(vocabulary.added())
        tokenizer.backend_tokenizer.post_processor = _beginning(vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise ModelError(f"the tokenizer of {path} is broken: {one_line(error)}; get another file of it") from error
    for name, key in NAMED.items():
        setattr(tokenizer, name, vocabulary.named(key))
    tokenizer.chat_template = chat_template(metadata)
    return tokenizer


def chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template; if there are several, by their names, of which transformers knows `default` and `tool_use`."""
    default = metadata.get("tokenizer.chat_template")
    further = {
        name: metadata.get(f"tokenizer.chat_template.{name}") for name in metadata.get("tokenizer.chat_templates", ())
    }
    templates = {name: template for name, template in further.items() if template}
    if default and templates.keys() - {"default"}:
        return {"default": default} | templates
    return default or templates or None


def _from_pairs(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Make a tokenizer that merges by a list of pairs; its tokens are bytes, or in a few models characters."""
    name = vocabulary.get("pre") or splits.OF_ARCHITECTURE.get(vocabulary.metadata["general.architecture"], "default")
    ids = vocabulary.ids
    pairs = (merge.partition(" ")[::2] for merge in vocabulary.get("merges", ()))
    merges = [pair for pair in pairs if pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids]
    if name in splits.CHARACTERS or vocabulary.get("model") == "gemma4":
        _of_characters(tokenizer, vocabulary, merges, prefix=False)
        return
    if name not in splits.SPLITS:
        logger.warning(
            "%s splits text in a way that is unknown here (%s): some words become other tokens than the model knows",
            vocabulary.path,
            name,
        )
    tokenizer.model = models.BPE(ids, merges, ignore_merges=name in splits.WHOLE_WORDS_FIRST)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits.SPLITS.get(name, splits.DEFAULT)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if name in splits.COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()


def _from_scores(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Make a tokenizer that merges characters where the whole has the highest score, as SentencePiece does."""
    scores = vocabulary.get("scores")
    if scores is None or len(scores) < len(vocabulary.tokens):
        raise ModelError(f"{vocabulary.path} is broken: its tokens have no scores; get another file of the model")
    normal = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=False)
        if kind == TokenType.NORMAL
    }
    # Some files have one score for all tokens: then the order of the tokens counts, and pieces of spaces come last.
    best_first = sorted(normal, key=lambda token: (-normal[token], not token.strip(SPACE)))
    merges = [
        (left, right)
        for token in best_first
        for cut in range(1, len(token))
        if (left := token[:cut]) in normal and (right := token[cut:]) in normal
    ]
    _of_characters(tokenizer, vocabulary, merges, vocabulary.get("add_space_prefix", True))


def _of_characters(tokenizer: Tokenizer, vocabulary: Vocabulary, merges: list[tuple[str, str]], prefix: bool) -> None:
    """Make a tokenizer of characters: a space is a sign of its own, and bytes stand for characters without a token."""
    unknown = vocabulary.named("unknown")
    tokenizer.model = models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    first, steps = [normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]  # a space before the first word
    tokenizer.normalizer = normalizers.Sequence([*(first if prefix else []), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *(steps if prefix else [])]
    )


def _beginning(vocabulary: Vocabulary) -> Any:
    """Adds the tokens for the beginning and the end of a text, if the file says so, or its kind does."""
    begins = vocabulary.get("model") == "llama" or vocabulary.get("pre") in splits.BEGINS
    bos = vocabulary.named("bos") if vocabulary.get("add_bos_token", begins) else None
    eos = vocabulary.named("eos") if vocabulary.get("add_eos_token", False) else None
    if bos is None and eos is None:
        return None
    special = [(token, vocabulary.ids[token]) for token in {bos, eos} if token]
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=special)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting garbage while half a million tuples are made takes longer than to make them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
