"""Continuous batching over token ids: sequences join and leave at any step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.engine.logprobs import Logprobs, LogprobsToHost
from models.engine.runner import Runner
from models.engine.sampler import Sampler
from models.engine.scheduler import Chunk, PrefillLimits, Scheduler
from models.engine.sequence import Sequence, Token
from models.engine.token_masks import TokenMasks
from models.engine.transfers import ToHost, to_device
from models.errors import FormatFailedError
from models.messages import FinishReason


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device computes, and the sequences that get a token by it, in order."""

    sequences: list[Sequence]
    tokens: ToHost | None = None  # None: no sequence gets one
    logprobs: LogprobsToHost | None = None  # None: no sequence asks for them


class Engine:
    """Runs many sequences over one model. Not thread-safe: one thread owns it.

    A step is one forward for all sequences. The scheduler chooses what it computes, the runner computes the logits,
    and the sampler chooses the next tokens. If the runner works ahead, as on a GPU, the next step is launched before
    the tokens of this one are read, so that the device never waits for the host. A sequence that ends by its token is
    in the next step too, then; that step's token is dropped.

    The mask of a sequence with a constraint needs the token before. So once the forward is launched, the tokens of the
    step before it are read, and the masks are made while the device computes; then the sampling is launched.
    """

    def __init__(self, runner: Runner, prefill: PrefillLimits | None = None) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.slots, prefill or runner.prefill, runner.whole_prefixes, runner.blocks)
        self.sampler = Sampler(runner.slots, runner.logits_size, runner.device)
        self._launched: LaunchedStep | None = None  # whose tokens are not read yet
        self._tokens: list[Token] = []  # read, and not returned yet
        self._failed: list[Sequence] = []  # ended by their constraints, and not taken yet

    @property
    def idle(self) -> bool:
        return not (self.scheduler.running or self._launched or self._tokens or self._failed)

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
        changes nothing: it can be tried again, and gives the same tokens. `take_failed` has the sequences that ended
        without a token.
        """
        chunks = self.scheduler.schedule(self.scheduler.active if among is None else among)
        launched = self._launch(chunks) if chunks else None
        before, self._launched = self._launched, launched
        self._read(before)
        if among is not None or not self.runner.works_ahead:
            self._launched = None
            self._read(launched)
        tokens, self._tokens = self._tokens, []
        return tokens

    def take_failed(self) -> list[Sequence]:
        """The sequences whose constraints have failed since the last call; each one's `error` says why."""
        failed, self._failed = self._failed, []
        return failed

    def _launch(self, chunks: list[Chunk]) -> LaunchedStep:
        """Let the device compute some chunks and choose the tokens after them."""
        ready = [chunk.sequence for chunk in chunks if chunk.gives_token]
        try:
            logits = self.runner.run(chunks)
            launched = self._choose(logits, ready) if ready else LaunchedStep(ready)
        except Exception:
            self.runner.discard(chunks)
            raise
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        for sequence in ready:
            sequence.expect()
            if sequence.error and sequence.slot >= 0:
                self._fail(sequence)
        return launched

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> LaunchedStep:
        """Choose the next tokens of some sequences, for the host and for the next step."""
        slots, uniforms = [sequence.slot for sequence in sequences], [sequence.uniform for sequence in sequences]
        where = to_device(slots, self.runner.device)
        tokens = self.sampler.sample(logits, slots, where, uniforms, self._make_masks(sequences))
        launched = LaunchedStep(sequences, ToHost(tokens), self.sampler.logprobs(logits, slots, tokens))
        # What changes comes last, and takes no memory: a step that fails before can be tried again.
        self.sampler.count(slots, where, tokens)
        self.runner.keep(where, tokens)
        return launched

    def _make_masks(self, sequences: list[Sequence]) -> TokenMasks | None:
        """The masks of the next tokens of some sequences, which are made after the tokens before them."""
        if not any(sequence.constraint for sequence in sequences):
            return None
        before, self._launched = self._launched, None
        self._read(before)
        rows = [row for row, sequence in enumerate(sequences) if sequence.constraint and sequence.slot >= 0]
        if not rows:
            return None
        masks = TokenMasks(rows, self.runner.logits_size, self.sampler.device)
        for row, mask in zip(rows, masks.bits, strict=True):
            sequence = sequences[row]
            try:
                assert sequence.constraint
                sequence.constraint.fill(mask)
            except FormatFailedError as error:
                sequence.error = error  # it ends once the step is launched
                mask.fill_(-1)
        return masks

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence whose constraint cannot go on. A token in flight is dropped."""
        self.scheduler.release(sequence)
        self._failed.append(sequence)

    def _read(self, step: LaunchedStep | None) -> None:
        """Wait for the tokens of a step. Sequences that have ended since it was launched get none.

        If the device fails meanwhile, the tokens are lost; but then it fails for good.
        """
        if not step or not step.tokens:
            return
        logprobs = step.logprobs.read() if step.logprobs else {}
        for row, (sequence, token_id) in enumerate(zip(step.sequences, step.tokens.tolist(), strict=True)):
            if sequence.slot >= 0:
                try:
                    self._tokens.append(self._append(sequence, token_id, logprobs.get(row)))
                except FormatFailedError as error:
                    sequence.error = error
                    self._fail(sequence)

    def _append(self, sequence: Sequence, token_id: int, logprobs: Logprobs | None) -> Token:
        """Append a token to a sequence, and release the sequence if that was its last one."""
        sequence.append(token_id)
        token = Token(sequence, token_id, self._finish_reason(sequence), logprobs)
        if token.finish_reason:
            self.scheduler.release(sequence)
        return token

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why a sequence ends by its last token, if it does."""
        if sequence.tokens[-1] in sequence.stop_ids:
            return "stop"
        if sequence.constraint:
            sequence.constraint.accept(sequence.tokens[-1])
            if sequence.constraint.ended:
                return "stop"
        if sequence.generated == sequence.max_tokens:
            return "max_output_tokens"
        if len(sequence.tokens) == self.runner.context:
            return "context_length"
        return None
