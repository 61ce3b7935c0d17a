"""Compiles the formats of replies into constraints."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from models.errors import InvalidValueError, UnsupportedParameterError, one_line
from models.language.grammar.constraint import CompiledGrammar, GrammarConstraint
from models.language.grammar.lark import lark_of
from models.language.grammar.limits import GRAMMAR_LIMITS, SCHEMA_LIMITS, check_schemas
from models.output_format import PLAIN_TEXT, OutputFormat

KEPT = 32  # compiled grammars
KEPT_BYTES = 2**20  # of their texts
WORN_SECONDS = 0.02  # after so much use, a grammar has learnt some megabytes, and is compiled again

PLACE = re.compile(r"^(?:at )?\d+\(\d+\): ")  # line and column
EXCERPT = re.compile(r"\n\s*\d+ \| .*", re.DOTALL)


class _Key(NamedTuple):
    user: str  # nobody can wear out, or learn of, the grammars of others
    lark: str
    param: str
    type: str  # of the client's format in it


class Grammars:
    """Compiles formats for one tokenizer, in threads of its own.

    `vocabulary` is the size of the logits. `stop_ids` are the tokens that end a reply where its format may end. One
    format of each user is compiled at a time, so that a user with many, or slow ones, waits for the others' first ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_ids: Iterable[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocabulary = max(vocabulary, len(tokenizer))
        self._stop_ids = sorted(stop_ids)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None  # is made once, for the first format: it takes 0.3 s
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._kept: OrderedDict[_Key, CompiledGrammar] = OrderedDict()  # the last used one comes last
        self._lock = Lock()  # of `_kept`

    async def compile(self, format: OutputFormat, user: str = "") -> GrammarConstraint | None:
        """The constraint of a format; None for free text.

        Raises InvalidValueError for what cannot be honoured, and UnsupportedParameterError for all formats if the
        tokenizer is of an unknown kind.
        """
        if format.type == "text":
            return None
        return await self._run(user, lambda: self._compile(lark_of(format), format.param, user, format))

    async def compile_lark(
        self, lark: str, param: str, user: str = "", format: OutputFormat = PLAIN_TEXT
    ) -> GrammarConstraint:
        """The constraint of Lark text that the server wrote; `format` is the client's format in it, if there is one.

        Raises the errors of `compile`; `param` is the parameter that they name.
        """
        return await self._run(user, partial(self._compile, lark, param, user, format))

    def close(self) -> None:
        """End the threads. What they compile is waited for by no one."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, user: str, compile: Callable[[], GrammarConstraint]) -> GrammarConstraint:
        self._tokenizer = self._tokenizer or self._threads.submit(self._make_tokenizer)
        async with self._turns.setdefault(user, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._threads, compile)

    def _make_tokenizer(self) -> LLTokenizer:
        if not self._stop_ids:
            raise ValueError("it has no token that ends a reply")
        return from_tokenizer(self._hf_tokenizer, self._vocabulary, self._stop_ids)  # type: ignore[arg-type]

    def _compile(self, lark: str, param: str, user: str, format: OutputFormat) -> GrammarConstraint:
        key = _Key(user, lark, param, format.type)
        with self._lock:
            grammar = self._kept.pop(key, None)
            if grammar and grammar.seconds < WORN_SECONDS:
                self._kept[key] = grammar
                return grammar.new_constraint()
        grammar = self._new_grammar(key)
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > KEPT or sum(len(kept.lark) for kept in self._kept) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return grammar.new_constraint()

    def _new_grammar(self, key: _Key) -> CompiledGrammar:
        check_schemas(key.lark, key.param)
        assert self._tokenizer
        try:
            tokenizer = self._tokenizer.result()
        except Exception as error:  # llguidance raises plain ones
            raise UnsupportedParameterError(
                f"replies of this model cannot have a format, because of its tokenizer: {one_line(str(error))}",
                key.param,
            ) from error
        limits = GRAMMAR_LIMITS if key.type in ("regex", "grammar") else SCHEMA_LIMITS
        matcher = LLMatcher(tokenizer, key.lark, log_level=0, limits=limits)
        if matcher.is_error():
            reason = _reason(matcher.get_error(), with_place=key.type == "grammar")
            raise InvalidValueError(f"{key.param} cannot be honoured: {reason}", key.param)
        return CompiledGrammar(matcher, (self._vocabulary + 31) // 32, key.param)


def _reason(error: str, with_place: bool) -> str:
    """What llguidance says, in one line. The place is one in Lark text, which the client may not have written."""
    text = EXCERPT.sub("", error.replace("<non-verbose/>", ""))
    if not with_place:
        text = PLACE.sub("", text).removeprefix("failed to compile JSON schema: ")
    return one_line(text)
