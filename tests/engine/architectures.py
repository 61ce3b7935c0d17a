"""Small models of every class that transformers loads as a causal language model, and what the engine makes of them.

`python -m tests.engine.architectures` writes the table of models/engine/README.md.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.engine.architecture import check_architecture
from models.engine.block_runner import BlockRunner
from models.engine.engine import Engine
from models.engine.fused_attention import FusedAttention
from models.engine.model_runner import ModelRunner
from models.engine.recurrent_layer import has_recurrent_layers
from models.engine.sampling_params import SamplingParams
from models.engine.scheduler import PrefillLimits
from models.engine.sequence import Sequence
from models.engine.twin import small, spread
from models.errors import UnsupportedModelError

README = Path(__file__).parents[2] / "models/engine/README.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
EQUAL = "equal"
WINDOW = " with a window"  # after the name of an architecture: layers attend to few tokens only

NOT_BUILT = {
    "blt": "its parts have sizes that depend on each other in a way of their own",
    "codegen": "it has at least four heads, in four groups",
    "dots3_note": "its parts have sizes that depend on each other in a way of their own",
    "gemma3n": "it needs pillow and timm",
    "gemma4_assistant": "it needs the states of another model",
    "gemma4_unified_assistant": "it needs the states of another model",
    "musicgen": "its tokens are sounds",
    "musicgen_melody": "its tokens are sounds",
    "reformer": "its parts have sizes that depend on each other in a way of their own",
    "zamba": "its parts have sizes that depend on each other in a way of their own",
    "zamba2": "its parts have sizes that depend on each other in a way of their own",
}

WINDOWED = [  # these have a window that is off by default
    *("doge", "minimax", "ministral3", "mixtral", "nemotron_h", "phi3", "phi4_multimodal", "phimoe", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2", "zaya"),
]

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    f"indexer_{name}": value
    for name, value in [("n_heads", 2), ("kv_heads", 1), ("head_dim", 256), ("budget", 16), ("compress_ratio", 4)]
}

# What the default configuration of a class lacks, and what its published models have.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "xmod": {"default_language": "en_XX"},
}


def architectures() -> list[str]:
    """All architectures; those of `WINDOWED` are there a second time, with a window."""
    return [
        name for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for name in (kind, kind + WINDOW)[: 1 + (kind in WINDOWED)]
    ]


def config_of(name: str) -> PreTrainedConfig:
    """The default configuration of an architecture, as a decoder, with its changes."""
    kind, windowed = name.removesuffix(WINDOW), name.endswith(WINDOW)
    changes = CHANGES.get(kind, {}) | ({"sliding_window": 4096, "use_sliding_window": True} if windowed else {})
    config = CONFIG_MAPPING[kind](**changes)
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def small_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = small(config_of(name))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    spread(model)
    model.train(False)
    return model


def verdict(name: str) -> str:
    """What becomes of an architecture. Raises AssertionError if the engine accepts it, and gives a wrong reply.

    An engine with its cache in blocks comes to the same verdict, but for recurrent layers, which need slots.
    """
    if name in NOT_BUILT:
        return f"not built: {NOT_BUILT[name]}"
    model = small_model(name)
    verdicts = [_verdict(model, blocks) for blocks in (False, True) if not (blocks and has_recurrent_layers(model))]
    assert len(set(verdicts)) == 1, verdicts
    return verdicts[0]


def _verdict(model: PreTrainedModel, blocks: bool) -> str:
    try:
        check_architecture(model, blocks=blocks)
        sequences = answered(model, blocks)
    except UnsupportedModelError as error:
        return f"refused: {error.reason}"
    model.set_attn_implementation("eager")
    for sequence in sequences:
        assert_greedy(model, sequence)
    return EQUAL


def answered(model: PreTrainedModel, blocks: bool = False) -> list[Sequence]:
    """Sequences with replies: several at once, in chunks, and two that reuse the beginning of the first one."""
    source = random.Random(5)
    runner: ModelRunner | BlockRunner
    if blocks:
        runner = BlockRunner(model, 3, 96, block_size=16, fused=FusedAttention(allowed=False))
    else:
        runner = ModelRunner(model, slots=3, context=96)
    engine = Engine(runner, PrefillLimits(8, 128))
    first, *others = [[source.randrange(3, 97) for _ in range(length)] for length in (45, 20, 33)]
    sequences = [Sequence(prompt, SamplingParams(), 8) for prompt in (first, *others)]
    _run(engine, sequences)
    again = [Sequence(prompt, SamplingParams(), 8) for prompt in ([*sequences[0].tokens, 5, 6], [*first[:30], 8, 9])]
    _run(engine, again)
    reused = again[:1] if runner.whole_prefixes else again  # a state cannot go back to the middle of a sequence
    assert all(sequence.reused >= 30 for sequence in reused)
    return sequences + again


def _run(engine: Engine, sequences: list[Sequence]) -> None:
    """Start a sequence every other step, and run all to their ends."""
    waiting, steps = list(sequences), 0
    while waiting or not engine.idle:
        if waiting and steps % 2 == 0:
            engine.add(waiting.pop(0))
        engine.step()
        steps += 1


@torch.inference_mode()
def assert_greedy(model: PreTrainedModel, sequence: Sequence) -> None:
    """Assert that each token of a reply is the model's own choice, by one plain forward without a cache."""
    logits = model(input_ids=torch.tensor([sequence.tokens]), use_cache=False).logits[0]
    for index in range(len(sequence.prompt), len(sequence.tokens)):
        chosen, highest = logits[index - 1, sequence.tokens[index]], logits[index - 1].max()
        assert highest - chosen <= 1e-4 * highest.abs(), f"token {index - len(sequence.prompt)} of the reply is wrong"


def table(verdicts: dict[str, str]) -> str:
    """The table of the verdicts, with all architectures of a verdict in a row."""
    rows = defaultdict(list)
    for name, text in verdicts.items():
        rows[text].append(name)
    lines = [f"| {text} | {len(names)}: {', '.join(names)} |\n" for text, names in sorted(rows.items())]
    return "".join(["| verdict | architectures, by the `model_type` of their configuration |\n|---|---|\n", *lines])


def written() -> dict[str, str]:
    """The verdicts in the README."""
    text = README.read_text(encoding="utf-8")
    rows = [line.strip("| \n").split(" | ") for line in text[text.index(BEGIN) : text.index(END)].splitlines()[3:]]
    return {name: verdict for verdict, names in rows for name in names.partition(": ")[2].split(", ")}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(before + table({name: verdict(name) for name in architectures()}) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
