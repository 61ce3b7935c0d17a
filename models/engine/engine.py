"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.engine.runner import Runner
from models.engine.sampler import Sampler
from models.engine.scheduler import Chunk, PrefillLimits, Scheduler
from models.engine.sequence import Sequence, Token
from models.engine.transfers import TokensToHost, to_device
from models.messages import FinishReason


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device computes, and the sequences that get a token by it, in order."""

    sequences: list[Sequence]
    tokens: TokensToHost | None  # None: no sequence gets one


class Engine:
    """Runs many sequences over one model. Not thread-safe: one thread owns it.

    A step is one forward for all sequences. The scheduler chooses what it computes, the runner computes the logits,
    and the sampler chooses the next tokens. If the runner works ahead, as on a GPU, the next step is launched before
    the tokens of this one are read, so that the device never waits for the host. A sequence that ends by its token is
    in the next step too, then; that step's token is dropped.
    """

    def __init__(self, runner: Runner, prefill: PrefillLimits | None = None) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.slots, prefill or runner.prefill, runner.whole_prefixes, runner.blocks)
        self.sampler = Sampler(runner.slots, runner.logits_size, runner.device)
        self._launched: LaunchedStep | None = None  # whose tokens are not read yet

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self._launched

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache that running sequences use, from 0 to 1."""
        if blocks := self.runner.blocks:
            return blocks.share_of([slot for slot, sequence in enumerate(self.scheduler.slots) if sequence])
        cached = sum(sequence.cached for sequence in self.scheduler.slots if sequence)
        return cached / self.runner.capacity

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a free slot, with the longest prefix of its prompt that it may reuse.

        Asserts that a slot is free and that the model can process the prompt.
        """
        assert 0 < len(sequence.prompt) < self.runner.context
        assert max(sequence.prompt) < self.runner.vocabulary
        assert sequence.max_tokens > 0
        sequence.final_length = min(sequence.final_length, self.runner.context)
        placement = self.scheduler.find_slot(sequence)
        self.sampler.assign(placement.slot, sequence.params, sequence.prompt)  # first, since it may run out of memory
        self.scheduler.reserve(placement)
        self.runner.prepare_slot(placement)
        self.scheduler.start(sequence, placement)

    def cancel(self, sequence: Sequence) -> None:
        """Free the slot of a sequence at once; does nothing if it has no slot."""
        self.scheduler.release(sequence)

    def step(self, among: list[Sequence] | None = None) -> list[Token]:
        """Compute one forward, and return a token for each sequence that has a new one.

        If `among` is given, only these sequences take part, and all tokens are waited for. A forward that raises
        changes nothing: it can be tried again, and gives the same tokens.
        """
        chunks = self.scheduler.schedule(self.scheduler.active if among is None else among)
        launched = self._launch(chunks) if chunks else None
        before, self._launched = self._launched, launched
        tokens = self._read(before)
        if among is not None or not self.runner.works_ahead:
            self._launched = None
            tokens += self._read(launched)
        return tokens

    def _launch(self, chunks: list[Chunk]) -> LaunchedStep:
        """Let the device compute some chunks and choose the tokens after them."""
        ready = [chunk.sequence for chunk in chunks if chunk.gives_token]
        try:
            logits = self.runner.run(chunks)
            tokens = self._choose(logits, ready) if ready else None
        except Exception:
            self.runner.discard(chunks)
            raise
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        for sequence in ready:
            sequence.expect()
        return LaunchedStep(ready, tokens)

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> TokensToHost:
        """Choose the next tokens of some sequences, for the host and for the next step."""
        slots, uniforms = [sequence.slot for sequence in sequences], [sequence.uniform for sequence in sequences]
        where = to_device(slots, self.runner.device)
        tokens = self.sampler.sample(logits, slots, where, uniforms)
        to_host = TokensToHost(tokens)
        # What changes comes last, and takes no memory: a step that fails before can be tried again.
        self.sampler.count(slots, where, tokens)
        self.runner.keep(where, tokens)
        return to_host

    def _read(self, step: LaunchedStep | None) -> list[Token]:
        """Wait for the tokens of a step. Sequences that have ended since it was launched get none.

        If the device fails meanwhile, the tokens are lost; but then it fails for good.
        """
        if not step or not step.tokens:
            return []
        pairs = zip(step.sequences, step.tokens.tolist(), strict=True)
        return [self._append(sequence, token_id) for sequence, token_id in pairs if sequence.slot >= 0]

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
