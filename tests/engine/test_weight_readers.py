from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mamba.modeling_mamba import MambaForCausalLM, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from models.engine.architecture import engine_logits, own_logits
from models.engine.quantization import quantizable
from models.engine.weight_readers import children_read
from tests.support.recurrent_models import tiny_recurrent
from tests.support.tiny import to_int8


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.asked, self.trained = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.ndim:
            return x @ self.trained.weight
        return self.called(x.to(self.asked.weight.dtype)) @ self._weight()  # type: ignore[no-any-return]

    def _weight(self) -> torch.Tensor:
        return self.read.weight.T


class Heir(Reader):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_class_reads_the_weights_that_its_code_names_except_in_training_and_for_their_dtype() -> None:
    assert children_read(Reader) == {"read"}
    assert children_read(Heir) == {"read"}


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (MambaMixer, {"conv1d", "dt_proj"}),
        (Mamba2Mixer, {"conv1d"}),
        (MambaForCausalLM, set()),  # it asks for the dtype of its head
        (LlamaDecoderLayer, set()),
        (nn.Linear, set()),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_the_classes_of_libraries_read(kind: type[nn.Module], read: set[str]) -> None:
    assert children_read(kind) == read


def test_a_weight_that_the_model_reads_itself_is_not_quantized() -> None:
    names = {name.rsplit(".", 2)[-2] for name in quantizable(tiny_recurrent("mamba", time_step_rank=32))}
    assert names == {"embeddings", "in_proj", "x_proj", "out_proj", "lm_head"}


@pytest.mark.compiler
@pytest.mark.parametrize(("family", "rank"), [("mamba", "time_step_rank"), ("jamba", "mamba_dt_rank"), ("mamba2", "")])
def test_a_quantized_recurrent_model_has_the_same_logits_in_slots(family: str, rank: str) -> None:
    model = to_int8(tiny_recurrent(family, **{rank: 32} if rank else {}))
    expected = own_logits(model)
    for ours, own in zip(engine_logits(model, native=True), expected, strict=True):
        assert (ours - own).abs().max() <= 0.02 * own.abs().max()
