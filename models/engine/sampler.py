"""Chooses next tokens from logits, for many sequences at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from models.engine.sampling_params import SamplingParams

CANDIDATES = 256  # the most probable tokens; top-k and top-p nearly always choose among them


class Sampler:
    """Chooses the next tokens of many sequences at once, each by the parameters of its slot."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.device = device
        self.params = [SamplingParams()] * slots
        # Tokens in the prompt or the reply of each slot, for the repetition penalty.
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        # Token counts of the reply, for the slots with a frequency or presence penalty only.
        self.counts: dict[int, Counter[int]] = {}

    @torch.inference_mode()
    def assign(self, slot: int, params: SamplingParams, prompt: Iterable[int]) -> None:
        """Set the parameters of the sequence that gets a slot."""
        self.params[slot] = params
        self.seen[slot] = False
        self.seen[slot, torch.tensor(list(prompt), device=self.device)] = True
        self.counts.pop(slot, None)
        if params.frequency_penalty or params.presence_penalty:
            self.counts[slot] = Counter()

    @torch.inference_mode()
    def sample(self, logits: Tensor, slots: list[int], uniforms: list[float]) -> list[int]:
        """The next token of each slot.

        `logits` is (rows, vocabulary), row i belongs to `slots[i]`. `uniforms[i]`, in [0, 1), is the only random
        number that its sequence uses for this token, so a seed gives the same reply in any batch.
        """
        logits = self._penalize(logits.to(self.device, torch.float32), slots)
        tokens = self._choose(logits, [self.params[slot] for slot in slots], uniforms)
        ids: list[int] = tokens.tolist()
        # State changes last: a step that fails before this line may be tried again.
        self.seen[torch.tensor(slots, device=self.device), tokens] = True
        for slot, token in zip(slots, ids, strict=True):
            if slot in self.counts:
                self.counts[slot][token] += 1
        return ids

    def _choose(self, logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
        """The next token of each row, (rows,): the most probable one, or a random one if it is not greedy."""
        tokens = logits.argmax(-1)
        sampled = [row for row, each in enumerate(params) if not each.greedy]
        truncated = [row for row in sampled if params[row].top_p < 1 or params[row].top_k]
        untruncated = [row for row in sampled if row not in truncated]
        for rows, draw in ((untruncated, self._draw_from_all), (truncated, self._draw_from_top)):
            if rows:
                chosen = [params[row] for row in rows]
                # The largest logit is subtracted, so that a tiny temperature cannot overflow.
                scaled = logits[rows] - logits[rows].amax(-1, keepdim=True)
                scaled /= self._column([each.temperature for each in chosen])
                tokens[rows] = draw(scaled, chosen, self._column([uniforms[row] for row in rows]))
        return tokens

    def _penalize(self, logits: Tensor, slots: list[int]) -> Tensor:
        """The logits after the penalties of the slots that have any."""
        penalties = [self.params[slot].repetition_penalty for slot in slots]
        if any(penalty != 1 for penalty in penalties):
            logits = self._penalize_seen(logits, torch.tensor(slots, device=self.device), self._column(penalties))
        if any(self.counts.get(slot) for slot in slots):
            logits = self._penalize_counted(logits, slots)
        return logits

    def _penalize_seen(self, logits: Tensor, slot: Tensor, penalty: Tensor) -> Tensor:
        """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858), as transformers applies it."""
        penalty = penalty.clamp(min=1e-6)  # a smaller one overflows
        return torch.where(self.seen[slot], torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _penalize_counted(self, logits: Tensor, slots: list[int]) -> Tensor:
        """Frequency and presence penalty of OpenAI's API; as in vLLM, the repetition penalty is applied first."""
        logits = logits.clone()
        for row, slot in enumerate(slots):
            if counts := self.counts.get(slot):
                params = self.params[slot]
                count = torch.tensor(list(counts.values()), device=self.device)
                penalty = count * params.frequency_penalty + params.presence_penalty
                logits[row, torch.tensor(list(counts), device=self.device)] -= penalty
        return logits

    def _draw_from_all(self, scaled: Tensor, params: list[SamplingParams], uniform: Tensor) -> Tensor:
        return _inverse_cdf(scaled.softmax(-1), uniform)

    def _draw_from_top(
        self, scaled: Tensor, params: list[SamplingParams], uniform: Tensor, few: int = CANDIDATES
    ) -> Tensor:
        """Apply top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751), and draw from the tokens that are left."""
        vocabulary = scaled.shape[-1]
        top_k = self._column([each.top_k or vocabulary for each in params])
        top_p = self._column([each.top_p for each in params])
        # On a CPU, sorting all 49,152 logits takes 3 ms a row, and finding the first 256 takes 0.2 ms. A GPU sorts
        # all: to check whether 256 are enough, the host would have to wait for it.
        few = min(few, vocabulary) if self.device.type == "cpu" else vocabulary
        best, order = scaled.topk(few)  # (rows, few)
        everything = scaled.exp().sum(-1, keepdim=True)
        rank = torch.arange(few, device=self.device)
        probability = best.exp().masked_fill(rank >= top_k, 0)
        # Top-p is a share of the sum that top-k leaves. If top-k is off, this is the sum over all tokens.
        probability /= torch.where(top_k <= few, probability.sum(-1, keepdim=True), everything)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill((before >= top_p) & (rank > 0), 0)
        tokens = order.gather(-1, _inverse_cdf(probability, uniform)[:, None]).squeeze(-1)
        if few < vocabulary:
            enough = (top_k <= few) | (best.exp().sum(-1, keepdim=True) > top_p * everything)
            # Only the rows that need it: sorting may put equally probable tokens in another order.
            if short := (~enough.squeeze(-1)).nonzero().squeeze(-1).tolist():
                again = [params[row] for row in short]
                tokens[short] = self._draw_from_top(scaled[short], again, uniform[short], vocabulary)
        return tokens

    def _column(self, numbers: list[float] | list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[:, None]  # (rows, 1)


def _inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """The inverse CDF of each row at its uniform number: the index of a token with a probability above 0, (rows,)."""
    cumulative = probability.cumsum(-1)
    # Rounding can lift the target to the sum itself, past the last token with a probability above 0.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).minimum(last).squeeze(-1)
