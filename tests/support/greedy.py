"""Whether replies are the greedy ones of a model's own forward, without any cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from models.engine.sequence import Sequence


@torch.inference_mode()
def greedy_misses(model: PreTrainedModel, sequences: Iterable[Sequence]) -> list[int]:
    """How many generated tokens of each sequence are not the likeliest ones after all tokens before them.

    The model must not be in use by an engine.
    """
    misses = []
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.tokens[:-1]]), use_cache=False).logits[0]
        likeliest = logits[len(sequence.prompt) - 1 :].argmax(-1).tolist()
        misses.append(sum(a != b for a, b in zip(likeliest, sequence.tokens[len(sequence.prompt) :], strict=True)))
    return misses
