"""Whether a sequence gets the same logits in any batch."""

from __future__ import annotations

import torch
from torch import Tensor

from models.engine.batch import Batch
from models.engine.engine import Engine
from tests.support.faulty import slots_of
from tests.support.tiny import prompts


def assert_equal_logits_in_any_batch(engine: Engine) -> None:
    """Assert that neither the other sequences of a batch nor the size of chunks changes a bit of the logits."""
    asked = prompts(50, 7, 33, 50, 21)

    def logits(size: int, others: int) -> Tensor:
        """The logits after each token of the first prompt, in chunks of a size, beside some other prompts."""
        results = []
        for start in range(0, 50, size):
            batch = Batch()
            for slot in reversed(range(others + 1)):
                if ids := asked[slot][start : start + size]:
                    batch.add(slot, ids, start)
            batch.logits_at = list(range(len(batch.ids) - len(asked[0][start : start + size]), len(batch.ids)))
            results.append(slots_of(engine).run_batch(batch))
        return torch.cat(results)

    expected = logits(50, others=0)
    assert expected.shape[0] == 50
    for size, others in [(50, 4), (1, 0), (1, 4), (7, 2), (16, 1)]:
        assert torch.equal(logits(size, others), expected)
