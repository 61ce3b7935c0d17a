"""How byte-level tokenizers split text before they merge bytes, by the name in `tokenizer.ggml.pre`.

A GGUF file has only this name; the expressions are those of the models' own tokenizers. Each expression splits further
what those before it left: what it matches, and what lies between, are pieces.
"""

from __future__ import annotations

ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"  # of English words
SPACES = r"\s+(?!\S)|\s+"  # the last space belongs to the next word
GPT2 = rf"{ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{SPACES}"
DIGIT = r"\p{N}"
DIGITS3 = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"  # Chinese, Hiragana, Katakana
CJK_OLD = "[一-龥\u0800-一가-\ud7ff]+"
# Letters that are upper or lower case, without some rare ones.
CASED = "[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[^\u0560-\u0588\u10d0-\u10ff\U0001d400-\U0001d7cb]]"


def _words(numbers: str, letters: str = r"\p{L}", endings: str = f"(?i:{ENDINGS})|", after: str = r"[\r\n]*") -> str:
    """Words with the sign before them, numbers, signs with the ends of lines after them, ends of lines, spaces."""
    signs = rf" ?[^\s{letters}\p{{N}}]+{after}"
    return rf"{endings}[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{numbers}|{signs}|\s*[\r\n]+|{SPACES}"


def _cased_words(numbers: str, endings: str) -> str:
    """The same, where words also end before a capital letter."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{endings}|{before}{upper}+{lower}*{endings}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{SPACES}"


LLAMA3 = (_words(DIGITS3),)
QWEN2 = (_words(DIGIT),)
GPT4O = (_cased_words(DIGITS3, f"(?i:{ENDINGS})?"),)
DIGITS_APART = (DIGIT, GPT2)
SIGNS = "\\s?[!-/:-~！-\uff0f：-\uff5e\u2018-\u201f\u3000-。]+"  # of ASCII, of full width, quotes
BLOOM = " ?[^(\\s|.,!?…。，、।\u06d4،)]+"
DEEPSEEK3 = (
    DIGITS3,
    CJK,
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|{SPACES}""",
)
DEFAULT = (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

SPLITS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    **dict.fromkeys(
        (
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "exaone4",
            "trillion",
            "granite-docling",
        ),
        (GPT2,),
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), DIGITS_APART
    ),
    **dict.fromkeys(
        (
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "dbrx",
            "smaug-bpe",
            "glm4",
            "chatglm-bpe",
        ),
        LLAMA3,
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        QWEN2,
    ),
    "qwen35": (_words(DIGIT, r"\p{L}\p{M}"),),
    "minicpm5": (DIGITS3, _words(r"\p{N}+")),
    "tekken": (_cased_words(DIGIT, ""),),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), GPT4O),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", *GPT4O)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), DEEPSEEK3),
    "deepseek-llm": (r"[\r\n]", rf"\s?{CASED}+", SIGNS, r"\s+$", CJK_OLD, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_OLD, DIGIT),
    "falcon": (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
    "viking": (BLOOM, DIGIT),
    "seed-coder": (
        rf"(?i:{ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\s*[\r\n]+|{SPACES}",
    ),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (rf"(?i:{ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{SPACES}",),
    ),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
}
CHARACTERS = {"gemma4", "granite-embed-multi-311m", "sarvam-moe"}  # tokens are characters, and texts are not split
WHOLE_WORDS_FIRST = {  # a piece that is a token stays whole, also if the merges do not lead to it
    *(name for name, splits in SPLITS.items() if splits is LLAMA3),
    "tekken",
    "minicpm5",
} - {"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}
BEGINS = WHOLE_WORDS_FIRST - {
    "minicpm5"
}  # texts begin with the token for the beginning, unless the file says otherwise
COMPOSED = {
    "qwen2",
    "deepseek-r1-qwen",
    "qwen35",
    "mpt",
    "olmo",
    "stablelm2",
    "command-r",
}  # e and an accent become é first
OF_ARCHITECTURE = {  # files of before May 2024 do not name their split
    "bloom": "bloom",
    "command-r": "command-r",
    "falcon": "falcon",
    "gpt2": "gpt-2",
    "gptneox": "mpt",
    "mpt": "mpt",
    "olmo": "olmo",
    "phi2": "phi-2",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2",
    "stablelm": "stablelm2",
    "starcoder2": "starcoder",
}
