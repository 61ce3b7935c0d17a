"""The forward of transformers' models, over the tokens of many sequences in a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.engine.attention import CausalMask
from models.errors import UnsupportedModelError


class Forward(nn.Module):
    """The forward of a model, as a function of tensors. Its attention finds the sequences of the tokens by itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, ids: Tensor, positions: Tensor, logits_at: Tensor) -> Tensor:
        """Logits after the tokens `logits_at`, (sequences, vocabulary); ids and positions are (tokens,)."""
        options = {"logits_to_keep": logits_at} if self.selects else {}
        logits: Tensor = self.model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **options
        ).logits
        return logits[0] if self.selects else logits[0, logits_at]


def replace_attention(model: PreTrainedModel, attention: str, first_step: Callable[[], Tensor]) -> Tensor:
    """Make a model use an attention of ours, and run a first step. Returns its logits. Raises UnsupportedModelError."""
    model.set_attn_implementation(attention)
    try:
        return first_step()
    except (TypeError, AttributeError) as error:
        if CausalMask.__name__ in str(error):
            raise UnsupportedModelError("it computes with its attention masks") from error
        raise UnsupportedModelError(f"its forward does not take what an attention function needs ({error})") from error
