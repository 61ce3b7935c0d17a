"""Checks that the engine computes what a model itself computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.engine.batch import Batch
from models.engine.block_runner import BlockRunner
from models.engine.fused_attention import FusedAttention
from models.engine.model_runner import ModelRunner
from models.engine.recurrent_layer import has_recurrent_layers
from models.engine.runner import uses_blocks
from models.engine.twin import WINDOW, make_twin
from models.errors import ModelError, UnsupportedModelError, one_line

SEQUENCES = [[(7 * i + 1) % 97 for i in range(40)], [(11 * i + 5) % 89 for i in range(21)]]
# What each step computes, as (sequence, start, end): one alone, a part of both, the rest but one, single tokens.
STEPS = [[(0, 0, 13)], [(1, 0, 5), (0, 13, 30)], [(0, 30, 39), (1, 5, 20)], [(0, 39, 40), (1, 20, 21)]]
WINDOWS = ("sliding_window", "attention_chunk_size")
ATTENTION_TYPES = {"full_attention", "sliding_attention"}
RECURRENT_TYPES = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe"}  # of models that have some
PRECISION = 1e-3  # of the largest logit. In float32, right models differ by at most 2e-5, wrong ones by 5e-2 or more


def check_architecture(model: PreTrainedModel, native: bool = True, blocks: bool | None = None) -> None:
    """Raise UnsupportedModelError if the engine would run a model wrongly.

    A small twin of the model runs both ways, in float32, past its windows. So the verdict does not depend on the
    model's weights, on its dtype, which may differ by 5% in its last bits, or on its device; and it takes a tenth of a
    second for a model of any size. If there is no twin, the model itself runs both ways. `blocks` is whether the
    cache is in blocks; None is as it will be.
    """
    blocks = uses_blocks(model) if blocks is None else blocks
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if unknown := layer_types - ATTENTION_TYPES - (RECURRENT_TYPES if has_recurrent_layers(model) else set()):
        raise UnsupportedModelError(f"it has {', '.join(sorted(unknown))}")
    try:
        twin = make_twin(model)
        expected = own_logits(twin)
        assert all(logits.isfinite().all() for logits in expected)
    except Exception:  # any class of a model can raise any error for sizes that it was not made for
        _check_itself(model, native, blocks)
    else:
        _compare(twin, native, blocks, expected, PRECISION)


def _check_itself(model: PreTrainedModel, native: bool, blocks: bool) -> None:
    """Check a model that has no twin, with short windows, as precisely as its dtype and its quantization allow."""
    with _short_windows(model):
        try:
            expected = own_logits(model)
            noise = _noise(model, expected)
        except Exception as error:
            raise UnsupportedModelError(f"it does not run on token ids alone ({one_line(error)})") from error
        _compare(model, native, blocks, expected, max(PRECISION, 4 * noise))


def _noise(model: PreTrainedModel, expected: list[Tensor]) -> float:
    """How far two right results of a model differ, such as those of two attentions of torch."""
    try:
        return _difference(own_logits(model, "sdpa"), expected)
    except (ValueError, ImportError):  # the model has only one
        return 4 * torch.finfo(model.dtype).eps


def _compare(model: PreTrainedModel, native: bool, blocks: bool, expected: list[Tensor], precision: float) -> None:
    try:
        difference = _difference(engine_logits(model, native, blocks), expected)
    except ModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"it fails when its attention is replaced ({one_line(error)})") from error
    if not difference <= precision:  # it may be NaN
        raise UnsupportedModelError("its tokens do more than attend to those before them in their own sequence")


def _difference(logits: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest logit."""
    pairs = zip(logits, expected, strict=True)
    return max(float((ours - own).abs().max() / own.abs().max()) for ours, own in pairs)


@torch.inference_mode()
def own_logits(model: PreTrainedModel, attention: str = "eager") -> list[Tensor]:
    """The logits after each token of the sequences, by the model's own attention, (tokens, vocabulary) each."""
    model.set_attn_implementation(attention)
    sequences = [torch.tensor([ids], device=model.device) for ids in SEQUENCES]
    return [model(input_ids=ids, use_cache=False).logits[0] for ids in sequences]


def engine_logits(model: PreTrainedModel, native: bool, blocks: bool = False) -> list[Tensor]:
    """The same logits, by the engine, with its cache in slots or in blocks. Raises UnsupportedModelError."""
    runner: ModelRunner | BlockRunner
    if blocks:
        plain = FusedAttention(allowed=False)  # our kernels are for a GPU, and are tried there
        runner = BlockRunner(model, len(SEQUENCES), 64, torch.float32, block_size=16, fused=plain)
    else:
        runner = ModelRunner(model, len(SEQUENCES), 64, native, torch.float32)
    results: list[list[Tensor]] = [[] for _ in SEQUENCES]
    for parts in STEPS:
        batch = Batch()
        for slot, start, end in parts:
            batch.add(slot, SEQUENCES[slot][start:end], start)
            if runner.blocks:
                runner.blocks.grow(slot, end)
        batch.logits_at = list(range(len(batch.ids)))
        sizes = [end - start for _, start, end in parts]
        for (slot, _, _), logits in zip(parts, torch.split(runner.run_batch(batch), sizes), strict=True):
            results[slot].append(logits)
    return [torch.cat(logits) for logits in results]


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend to few tokens where it has a window. Masks take the window from its configuration."""
    config = model.config.get_text_config(decoder=True)
    windows = {name: window for name in WINDOWS if (window := getattr(config, name, None))}
    for name, window in windows.items():
        setattr(config, name, min(window, WINDOW))
    try:
        yield
    finally:
        for name, window in windows.items():
            setattr(config, name, window)
