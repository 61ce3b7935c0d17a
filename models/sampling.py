"""Logits to next tokens, one row of parameters per sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses its tokens. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


class Sampler:
    """Chooses the next token of many sequences at once, each by the parameters of its slot."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.device = device
        self.temperature = torch.zeros(slots, device=device)
        self.top_p = torch.ones(slots, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.long, device=device)
        self.penalty = torch.ones(slots, device=device)
        # Which tokens a sequence has in its prompt or its reply, for the repetition penalty.
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)

    def place(self, slot: int, sampling: Sampling, prompt: Iterable[int]) -> None:
        """Take the parameters of a sequence that gets a slot."""
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = sampling.top_k
        self.penalty[slot] = max(sampling.repetition_penalty, 1e-6)  # less would overflow
        self.seen[slot] = False
        self.seen[slot, torch.tensor(list(prompt), device=self.device)] = True

    def sample(self, logits: Tensor, slots: list[int], uniforms: list[float]) -> list[int]:
        """Next token of each slot.

        `logits` is (rows, vocabulary), row i belongs to `slots[i]`; `uniforms[i]` in [0, 1) is the one random
        number its sequence spends on this token, so that a seed gives the same reply whoever else is there.
        """
        slot = torch.tensor(slots, device=self.device)
        logits = self._penalise(logits.to(self.device, torch.float32), slot)
        tokens = logits.argmax(-1)  # (rows,)
        drawn = (self.temperature[slot] > 0).nonzero()[:, 0]
        if len(drawn):
            uniform = torch.tensor(uniforms, device=self.device)
            tokens[drawn] = self._draw(logits[drawn], slot[drawn], uniform[drawn])
        self.seen[slot, tokens] = True
        return [int(token) for token in tokens.tolist()]

    def _penalise(self, logits: Tensor, slot: Tensor) -> Tensor:
        """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858), as transformers applies it."""
        penalty = self.penalty[slot, None]
        return torch.where(self.seen[slot], torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _draw(self, logits: Tensor, slot: Tensor, uniform: Tensor) -> Tensor:
        """Temperature, then top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751), then the inverse CDF."""
        # Less the largest, so that a tiny temperature cannot overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature[slot, None]
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)  # (rows, vocabulary)
        rank = torch.arange(scaled.shape[-1], device=self.device)
        top_k = self.top_k[slot, None]
        scaled = scaled.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
        probability = scaled.softmax(-1)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill((before >= self.top_p[slot, None]) & (rank > 0), 0)
        cumulative = probability.cumsum(-1)
        target = uniform[:, None] * cumulative[:, -1:]
        # Rounding can lift the target to the sum itself, past the last token that is left.
        left = (probability > 0).sum(-1, keepdim=True)
        index = torch.searchsorted(cumulative, target, right=True).minimum(left - 1).clamp_(min=0)
        return order.gather(-1, index).squeeze(-1)
