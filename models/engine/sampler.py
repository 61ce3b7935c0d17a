"""Chooses next tokens from logits, for many sequences at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.engine.logprobs import LogprobsToHost
from models.engine.sampling_params import SamplingParams
from models.engine.token_masks import TokenMasks, forbidden_by_byte
from models.engine.transfers import to_device

CANDIDATES = 256  # the most probable tokens; top-k and top-p nearly always choose among them
CANDIDATES_ELSEWHERE = 2048  # the same on other devices, where it is the most that top-k and top-p ever leave


class Sampler:
    """Chooses the next tokens of many sequences at once, each by the parameters of its slot.

    On a GPU, the host never waits for the device here: tokens, penalties and counts stay there.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.device = device
        self.params = [SamplingParams()] * slots
        # The same on the device: temperature, top-k (all if it is off), top-p, repetition, frequency, presence penalty,
        # min-p.
        self._numbers = torch.ones(slots, 7, device=device)
        # Tokens in the prompt or the reply of each slot, for the repetition penalty.
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        # How often each token is in the reply, (vocabulary,), for the slots with a frequency or presence penalty only.
        self.counts: dict[int, Tensor] = {}
        # The token ids and biases, (tokens,) each, of the slots with biases only.
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}
        self._forbidden = forbidden_by_byte(device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)  # a value of the host's would be waited for
        # A CPU looks whether the candidates are enough, and sorts all tokens if not. For a GPU, the host would have to
        # wait for the answer.
        self._looks_again = device.type == "cpu"
        self._candidates = CANDIDATES if self._looks_again else CANDIDATES_ELSEWHERE

    @torch.inference_mode()
    def assign(self, slot: int, params: SamplingParams, prompt: Iterable[int]) -> None:
        """Set the parameters of the sequence that gets a slot."""
        self.params[slot] = params
        top_k, penalties = params.top_k or self.seen.shape[1], (params.frequency_penalty, params.presence_penalty)
        numbers = (params.temperature, top_k, params.top_p, params.repetition_penalty, *penalties, params.min_p)
        self._numbers[slot].copy_(to_device([float(number) for number in numbers], self.device))
        self.seen[slot].fill_(False)
        self.seen[slot].index_fill_(0, to_device(list(prompt), self.device), True)
        self.counts.pop(slot, None)
        if params.frequency_penalty or params.presence_penalty:
            self.counts[slot] = torch.zeros(self.seen.shape[1], dtype=torch.int32, device=self.device)
        self._biases.pop(slot, None)
        if bias := params.logit_bias:
            values = [float(value) for value in bias.values()]
            self._biases[slot] = to_device(list(bias), self.device), to_device(values, self.device)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        slots: list[int],
        where: Tensor,
        uniforms: list[float],
        masks: TokenMasks | None = None,
    ) -> Tensor:
        """The next token of each slot, (rows,).

        `logits` is (rows, vocabulary), row i belongs to `slots[i]`; `where` is the slots on the device. `uniforms[i]`,
        in [0, 1), is the only random number that its sequence uses for this token, so a seed gives the same reply in
        any batch. Changes nothing: `count` does.

        In the order of vLLM: biases and masks, penalties, temperature, min-p, top-k and top-p.
        """
        numbers = self._numbers[where]
        logits = logits.to(self.device, torch.float32)
        with self._edited(logits, slots, masks):
            penalized = self._penalize(logits, slots, where, numbers)
            return self._choose(penalized, [self.params[slot] for slot in slots], numbers, uniforms)

    def logprobs(self, logits: Tensor, slots: list[int], tokens: Tensor) -> LogprobsToHost | None:
        """The probabilities of the new tokens of slots, (rows,), if some ask for them. `logits` is as for `sample`."""
        asked = {row: self.params[slot].logprobs for row, slot in enumerate(slots)}
        counts = {row: count for row, count in asked.items() if count is not None}
        return LogprobsToHost(logits, tokens, counts) if counts else None

    @torch.inference_mode()
    def count(self, slots: list[int], where: Tensor, tokens: Tensor) -> None:
        """Count the new tokens of slots, (rows,), for the penalties. `where` is the slots on the device."""
        self.seen.index_put_((where, tokens), self._true)
        for row, slot in enumerate(slots):
            if slot in self.counts:
                self.counts[slot].index_add_(0, tokens[row : row + 1], self._one)

    @contextmanager
    def _edited(self, logits: Tensor, slots: list[int], masks: TokenMasks | None) -> Iterator[None]:
        """Within this context, the logits have biases and masks. To copy all rows takes 2% of a step."""
        rows = {row for row, slot in enumerate(slots) if slot in self._biases}.union(masks.rows if masks else ())
        if not rows:
            yield
            return
        edited = to_device(sorted(rows), self.device)
        before = logits[edited]
        try:
            for row, slot in enumerate(slots):
                if slot in self._biases:
                    logits[row].index_add_(0, *self._biases[slot])
            if masks:
                masks.apply(logits, self._forbidden)
            yield
        finally:
            logits.index_copy_(0, edited, before)

    def _choose(self, logits: Tensor, params: list[SamplingParams], numbers: Tensor, uniforms: list[float]) -> Tensor:
        """The next token of each row, (rows,): the most probable one, or a random one if it is not greedy."""
        tokens = logits.argmax(-1)
        sampled = [row for row, each in enumerate(params) if not each.greedy]
        truncated = [row for row in sampled if params[row].top_p < 1 or params[row].top_k]
        untruncated = [row for row in sampled if row not in truncated]
        for rows, draw in ((untruncated, self._draw_from_all), (truncated, self._draw_from_top)):
            if rows:
                where = to_device(rows, self.device)
                uniform = to_device([uniforms[row] for row in rows], self.device)[:, None]
                temperature, top_k, top_p, *_, min_p = torch.split(numbers[where], 1, dim=-1)  # (rows, 1) each
                # The largest logit is subtracted, so that a tiny temperature cannot overflow.
                scaled = logits[where]
                scaled -= scaled.amax(-1, keepdim=True)
                scaled /= temperature
                if any(params[row].min_p for row in rows):  # a share of the largest probability
                    scaled.masked_fill_(scaled < min_p.log(), -torch.inf)
                tokens.index_copy_(0, where, draw(scaled, top_k, top_p, uniform))
        return tokens

    def _penalize(self, logits: Tensor, slots: list[int], where: Tensor, numbers: Tensor) -> Tensor:
        """The logits after the penalties of the slots that have any."""
        if any(self.params[slot].repetition_penalty != 1 for slot in slots):
            logits = self._penalize_seen(logits, where, numbers[:, 3:4])
        if any(slot in self.counts for slot in slots):
            logits = self._penalize_counted(logits, slots, numbers)
        return logits

    def _penalize_seen(self, logits: Tensor, slot: Tensor, penalty: Tensor) -> Tensor:
        """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858), as transformers applies it."""
        penalty = penalty.clamp(min=1e-6)  # a smaller one overflows
        return torch.where(self.seen[slot], torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _penalize_counted(self, logits: Tensor, slots: list[int], numbers: Tensor) -> Tensor:
        """Frequency and presence penalty of OpenAI's API; as in vLLM, the repetition penalty is applied first."""
        rows = [row for row, slot in enumerate(slots) if slot in self.counts]
        where, counts = to_device(rows, self.device), torch.stack([self.counts[slots[row]] for row in rows])
        frequency, presence = torch.split(numbers[where, 4:6], 1, dim=-1)  # (rows, 1) each
        return logits.index_add(0, where, counts * frequency + (counts > 0) * presence, alpha=-1)

    def _draw_from_all(self, scaled: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
        return _inverse_cdf(scaled.softmax(-1), uniform)

    def _draw_from_top(
        self, scaled: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor, few: int | None = None
    ) -> Tensor:
        """Apply top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751), and draw from the tokens that are left."""
        vocabulary = scaled.shape[-1]
        # On a CPU, sorting all 49,152 logits takes 3 ms a row, and finding the first 256 takes 0.2 ms.
        few = min(few or self._candidates, vocabulary)
        best, order = scaled.topk(few)  # (rows, few)
        everything = scaled.exp().sum(-1, keepdim=True)
        rank = torch.arange(few, device=self.device)
        probability = best.exp().masked_fill(rank >= top_k, 0)
        # Top-p is a share of the sum that top-k leaves. If top-k is off, this is the sum over all tokens.
        probability /= torch.where(top_k <= few, probability.sum(-1, keepdim=True), everything)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill((before >= top_p) & (rank > 0), 0)
        tokens = order.gather(-1, _inverse_cdf(probability, uniform)[:, None]).squeeze(-1)
        if few < vocabulary and self._looks_again:
            enough = (top_k <= few) | (best.exp().sum(-1, keepdim=True) > top_p * everything)
            enough |= best[:, -1:] == -torch.inf  # the others cannot come, as after a mask
            # Only the rows that need it: sorting may put equally probable tokens in another order.
            if short := (~enough.squeeze(-1)).nonzero().squeeze(-1).tolist():
                tokens[short] = self._draw_from_top(
                    scaled[short], top_k[short], top_p[short], uniform[short], vocabulary
                )
        return tokens


def _inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """The inverse CDF of each row at its uniform number: the index of a token with a probability above 0, (rows,)."""
    cumulative = probability.cumsum(-1)
    # Rounding can lift the target to the sum itself, past the last token with a probability above 0.
    last = probability.shape[-1] - 1 - (probability.flip(-1) > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).minimum(last).squeeze(-1)
