"""The formats of replies that families of models write, and the signs by which a model's own is found.

A sign is a text in the chat template, or a token of the tokenizer. The first entry with a sign counts. Names of models
are no signs: others are trained on the same formats. README.md says how to add an entry.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import re

from models.language.replies.call_format import CallFormat
from models.language.replies.gemma_calls import GemmaCalls
from models.language.replies.json_calls import JSONCalls
from models.language.replies.named_calls import NamedCalls
from models.language.replies.parser import Reasoning
from models.language.replies.tagged_calls import TaggedCalls

REASONING: tuple[tuple[str, Reasoning], ...] = (
    ("<|channel>", Reasoning("<|channel>thought", "<channel|>")),  # Gemma 4
    ("[THINK]", Reasoning("[THINK]", "[/THINK]")),  # Mistral
    ("<seed:think>", Reasoning("<seed:think>", "</seed:think>")),  # Seed-OSS
    ("<|START_THINKING|>", Reasoning("<|START_THINKING|>", "<|END_THINKING|>")),  # Command A
    ("◁think▷", Reasoning("◁think▷", "◁/think▷")),  # Kimi-VL
    ("<think>", Reasoning("<think>", "</think>")),  # Qwen3, GLM, SmolLM3, DeepSeek-R1, MiniMax, Nemotron
)

HERMES = JSONCalls(("<tool_call>",), "</tool_call>", space="\n")
MISTRAL_NAMED = NamedCalls(
    ("[TOOL_CALLS]",),
    re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?"),
    "{name}[ARGS]",
    markers=("[ARGS]", "[CALL_ID]"),
)
MISTRAL_LIST = JSONCalls(("[TOOL_CALLS]",), frame=("[", "]"))
DEEPSEEK = NamedCalls(
    ("<｜tool▁call▁begin｜>",),
    re.compile(r"\s*(?:function\s*<｜tool▁sep｜>)?\s*([^\s<]+)\s*(?:<｜tool▁sep｜>|```json)\s*"),
    "{name}<｜tool▁sep｜>",
    ("```", "<｜tool▁call▁end｜>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)
KIMI = NamedCalls(
    ("<|tool_call_begin|>",),
    re.compile(r"\s*(?:functions\.)?([^\s<:]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"),
    "functions.{name}:0<|tool_call_argument_begin|>",
    ("<|tool_call_end|>",),
    (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
)
GLM = TaggedCalls(
    ("<tool_call>",), ("", ""), ("<arg_key>", "</arg_key>"), "</arg_value>", "</tool_call>", "<arg_value>"
)
QWEN_CODER = TaggedCalls(
    ("<tool_call>", "<function="),
    ("<function=", ">"),
    ("<parameter=", ">"),
    "</parameter>",
    "</function>",
    ends=("</tool_call>",),
    line="\n",
)
SEED = TaggedCalls(
    ("<seed:tool_call>",),
    ("<function=", ">"),
    ("<parameter=", ">"),
    "</parameter>",
    "</function>",
    ends=("</seed:tool_call>",),
)
MINIMAX = TaggedCalls(
    ("<minimax:tool_call>",),
    ('<invoke name="', '">'),
    ('<parameter name="', '">'),
    "</parameter>",
    "</invoke>",
    ends=("</minimax:tool_call>",),
)
DEEPSEEK_XML = TaggedCalls(
    ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
    ('<｜DSML｜invoke name="', '">'),
    ('<｜DSML｜parameter name="', '">'),
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
    ends=("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
)
GEMMA4 = GemmaCalls(("<|tool_call>",), '<|"|>', "<tool_call|>", ("<|tool_response>",))
FUNCTION_GEMMA = GemmaCalls(
    ("<start_function_call>",), "<escape>", "<end_function_call>", ("<start_function_response>",)
)
PHI = JSONCalls(("<|tool_call|>",), "<|/tool_call|>", frame=("[", "]<|/tool_call|>"))
COHERE = JSONCalls(("<|START_ACTION|>",), "<|END_ACTION|>", "parameters", frame=("[", "]<|END_ACTION|>"))
PYTHON_TAG = JSONCalls(("<|python_tag|>",), arguments_key="parameters")
JSON = JSONCalls(arguments_key="parameters")  # Llama 3, and Gemma 3 as most templates for its tools ask it

CALLS: tuple[tuple[str, tuple[CallFormat, ...]], ...] = (
    ("<|tool_call>", (GEMMA4,)),
    ("<start_function_call>", (FUNCTION_GEMMA,)),
    ("<｜DSML｜", (DEEPSEEK_XML,)),
    ("<｜tool▁call▁begin｜>", (DEEPSEEK,)),
    ("<|tool_call_begin|>", (KIMI,)),
    ("[ARGS]", (MISTRAL_NAMED, MISTRAL_LIST)),
    ("[TOOL_CALLS]", (MISTRAL_LIST, MISTRAL_NAMED)),
    ("<minimax:tool_call>", (MINIMAX,)),
    ("<seed:tool_call>", (SEED,)),
    ("<|START_ACTION|>", (COHERE,)),
    ("<|tool_call|>", (PHI,)),
    ("<arg_key>", (GLM,)),
    ("<function=", (QWEN_CODER, HERMES)),
    ("<tool_call>", (HERMES,)),
    ("<|python_tag|>", (JSON, PYTHON_TAG)),
)
OTHER_CALLS: tuple[CallFormat, ...] = (JSON, HERMES)  # of a template that knows tools and has none of the signs
