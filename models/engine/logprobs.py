"""The probabilities of tokens, for sequences that ask for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.engine.transfers import ToHost, to_device

SMALLEST = -9999.0  # in place of minus infinity, which JSON has not; as in OpenAI's API


class Logprobs(NamedTuple):
    """The natural logarithm of a token's probability, and the most probable tokens with theirs, best first."""

    chosen: float
    top: list[tuple[int, float]]


class LogprobsToHost:
    """The probabilities of new tokens, on their way to the host.

    They are the model's own: the softmax of its logits before biases, masks, penalties and temperature, as vLLM's
    "raw_logprobs". `logits` is (rows, vocabulary), `tokens` (rows,); `counts` says of the rows that ask how many of the
    most probable tokens they want.
    """

    @torch.inference_mode()
    def __init__(self, logits: Tensor, tokens: Tensor, counts: dict[int, int]) -> None:
        self._counts = counts
        self._most = max(counts.values())
        where = to_device(list(counts), tokens.device)
        logprobs = logits.to(tokens.device)[where].float().log_softmax(-1)
        logprobs = logprobs.nan_to_num(SMALLEST, neginf=SMALLEST)
        chosen = logprobs.gather(-1, tokens[where][:, None])
        best = logprobs.topk(min(self._most, logprobs.shape[-1]))
        # One copy for all: float32 has every id below 2^24.
        self._numbers = ToHost(torch.cat([chosen, best.values, best.indices.float()], -1))

    def read(self) -> dict[int, Logprobs]:
        """The probabilities by row, once they are there."""
        read = {}
        for (row, count), (chosen, *best) in zip(self._counts.items(), self._numbers.tolist(), strict=True):
            values, ids = best[: len(best) // 2], best[len(best) // 2 :]
            read[row] = Logprobs(chosen, [(int(id), value) for id, value in zip(ids, values, strict=True)][:count])
        return read
