"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

from models.engine.model_runner import ModelRunner
from models.engine.sampler import Sampler
from models.engine.scheduler import Scheduler
from models.engine.sequence import Sequence, Token
from models.messages import FinishReason


class Engine:
    """Runs many sequences over one model. Not thread-safe: one thread owns it.

    A step is one forward for all sequences. The scheduler chooses what it computes, the runner computes the logits,
    and the sampler chooses the next tokens.
    """

    def __init__(self, runner: ModelRunner, prefill_chunk: int = 32) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.slots, prefill_chunk, whole_prefixes=bool(runner.states))
        self.sampler = Sampler(runner.slots, runner.logits_size, runner.device)

    @property
    def idle(self) -> bool:
        return not self.scheduler.running

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache that running sequences use, from 0 to 1."""
        cached = sum(sequence.cached for sequence in self.scheduler.slots if sequence)
        return cached / (self.runner.slots * self.runner.context)

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a free slot, with the longest prefix of its prompt that it may reuse.

        Asserts that a slot is free and that the model can process the prompt.
        """
        assert 0 < len(sequence.prompt) < self.runner.context
        assert max(sequence.prompt) < self.runner.vocabulary
        assert sequence.max_tokens > 0
        placement = self.scheduler.find_slot(sequence)
        self.sampler.assign(placement.slot, sequence.params, sequence.prompt)  # first, since it may run out of memory
        self.scheduler.reserve(placement)
        self.runner.prepare_slot(placement)
        self.scheduler.start(sequence, placement)

    def cancel(self, sequence: Sequence) -> None:
        """Free the slot of a sequence at once; does nothing if it has no slot."""
        self.scheduler.release(sequence)

    def step(self, among: list[Sequence] | None = None) -> list[Token]:
        """Compute one forward, and return a token for each sequence that decodes or whose prompt is complete.

        If `among` is given, only these sequences take part. A step that raises changes nothing: it can be tried again,
        and gives the same tokens.
        """
        chunks = self.scheduler.schedule(self.scheduler.active if among is None else among)
        if not chunks:
            return []
        ready = [chunk.sequence for chunk in chunks if chunk.gives_token]
        try:
            logits = self.runner.run(chunks)
            uniforms = [sequence.uniform for sequence in ready]
            ids = self.sampler.sample(logits, [sequence.slot for sequence in ready], uniforms) if ready else []
        except Exception:
            self.runner.discard(chunks)
            raise
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        return [self._append(sequence, token_id) for sequence, token_id in zip(ready, ids, strict=True)]

    def _append(self, sequence: Sequence, token_id: int) -> Token:
        """Append a token to a sequence, and release the sequence if that was its last one."""
        sequence.append(token_id)
        token = Token(sequence, token_id, self._finish_reason(sequence))
        if token.finish_reason:
            self.scheduler.release(sequence)
        return token

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in sequence.stop_ids:
            return "stop"
        if sequence.generated == sequence.max_tokens:
            return "max_output_tokens"
        if len(sequence.tokens) == self.runner.context:
            return "context_length"
        return None
