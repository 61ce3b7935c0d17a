"""Logits to next tokens, one row of parameters per sequence."""

from __future__ import annotations

from collections import Counter
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6  # in float32, less comes down to it or to a division by 0


CANDIDATES = 256  # most probable tokens that top-k and top-p nearly always choose among


class Sampler:
    """Chooses the next token of many sequences at once, each by the parameters of its slot."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.device = device
        self.parameters = [Sampling()] * slots
        # Which tokens a sequence has in its prompt or its reply, for the repetition penalty.
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        # How often a sequence has each token in its reply; only the slots whose frequency or presence penalty asks.
        self.counts: dict[int, Counter[int]] = {}

    def place(self, slot: int, sampling: Sampling, prompt: Iterable[int]) -> None:
        """Take the parameters of a sequence that gets a slot."""
        self.parameters[slot] = sampling
        self.seen[slot] = False
        self.seen[slot, torch.tensor(list(prompt), device=self.device)] = True
        self.counts.pop(slot, None)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.counts[slot] = Counter()

    def sample(self, logits: Tensor, slots: list[int], uniforms: list[float]) -> list[int]:
        """Next token of each slot.

        `logits` is (rows, vocabulary), row i belongs to `slots[i]`; `uniforms[i]` in [0, 1) is the one random
        number its sequence spends on this token, so that a seed gives the same reply whoever else is there.
        """
        logits = logits.to(self.device, torch.float32)
        parameters = [self.parameters[slot] for slot in slots]
        slot = torch.tensor(slots, device=self.device)
        if any(each.repetition_penalty != 1 for each in parameters):
            logits = self._penalise(logits, slot, self._column([each.repetition_penalty for each in parameters]))
        if any(self.counts.get(each) for each in slots):
            logits = self._penalise_counted(logits, slots)
        tokens = logits.argmax(-1)  # (rows,)
        drawn = [row for row, each in enumerate(parameters) if not each.greedy]
        cut = [row for row in drawn if parameters[row].top_p < 1 or parameters[row].top_k]
        whole = [row for row in drawn if row not in cut]
        for rows, draw in ((whole, self._draw_from_all), (cut, self._draw_from_top)):
            if rows:
                chosen = [parameters[row] for row in rows]
                # Less the largest, so that a tiny temperature cannot overflow.
                scaled = logits[rows] - logits[rows].amax(-1, keepdim=True)
                scaled /= self._column([each.temperature for each in chosen])
                tokens[rows] = draw(scaled, chosen, self._column([uniforms[row] for row in rows]))
        ids: list[int] = tokens.tolist()
        # Only now, since a step that fails before may be tried again.
        self.seen[slot, tokens] = True
        for place, token in zip(slots, ids, strict=True):
            if place in self.counts:
                self.counts[place][token] += 1
        return ids

    def _penalise(self, logits: Tensor, slot: Tensor, penalty: Tensor) -> Tensor:
        """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858), as transformers applies it."""
        penalty = penalty.clamp(min=1e-6)  # less would overflow
        return torch.where(self.seen[slot], torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _penalise_counted(self, logits: Tensor, slots: list[int]) -> Tensor:
        """Frequency and presence penalty of OpenAI's API; as in vLLM, the repetition penalty comes before them."""
        logits = logits.clone()
        for row, slot in enumerate(slots):
            if counts := self.counts.get(slot):
                sampling = self.parameters[slot]
                often = torch.tensor(list(counts.values()), device=self.device)
                penalty = often * sampling.frequency_penalty + sampling.presence_penalty
                logits[row, torch.tensor(list(counts), device=self.device)] -= penalty
        return logits

    def _draw_from_all(self, scaled: Tensor, parameters: list[Sampling], uniform: Tensor) -> Tensor:
        return _inverse(scaled.softmax(-1), uniform)

    def _draw_from_top(
        self, scaled: Tensor, parameters: list[Sampling], uniform: Tensor, few: int = CANDIDATES
    ) -> Tensor:
        """Top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751) of what is left."""
        vocabulary = scaled.shape[-1]
        top_k = self._column([each.top_k or vocabulary for each in parameters])
        top_p = self._column([each.top_p for each in parameters])
        # To sort all 49,152 takes a CPU 3 ms a row, to find the first 256 of them 0.2 ms. A GPU need not ask whether
        # they are enough, which would make the host wait for it.
        few = min(few, vocabulary) if self.device.type == "cpu" else vocabulary
        best, order = scaled.topk(few)  # (rows, few)
        everything = scaled.exp().sum(-1, keepdim=True)
        rank = torch.arange(few, device=self.device)
        probability = best.exp().masked_fill(rank >= top_k, 0)
        # Top-p counts shares of what top-k leaves, which is more than the best where it is off.
        probability /= torch.where(top_k <= few, probability.sum(-1, keepdim=True), everything)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill((before >= top_p) & (rank > 0), 0)
        tokens = order.gather(-1, _inverse(probability, uniform)[:, None]).squeeze(-1)
        if few < vocabulary:
            enough = (top_k <= few) | (best.exp().sum(-1, keepdim=True) > top_p * everything)
            # Each row by itself: to sort finds tokens that are equally probable in another order.
            if short := (~enough.squeeze(-1)).nonzero().squeeze(-1).tolist():
                again = [parameters[row] for row in short]
                tokens[short] = self._draw_from_top(scaled[short], again, uniform[short], vocabulary)
        return tokens

    def _column(self, numbers: list[float] | list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[:, None]  # (rows, 1)


def _inverse(probability: Tensor, uniform: Tensor) -> Tensor:
    """The inverse CDF of each row at its uniform number: an index that has a probability, (rows,)."""
    cumulative = probability.cumsum(-1)
    # Rounding can lift the target to the sum itself, past the last token that is left.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).minimum(last).squeeze(-1)
