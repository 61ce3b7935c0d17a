from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from models.engine.compiled_layers import CompiledLayers
from models.engine.engine import Engine
from models.engine.joined_linears import join_linears
from models.engine.sampling_params import SamplingParams
from models.engine.sequence import Sequence
from models.engine.subprocesses import Subprocesses
from models.errors import CompilationError
from tests.engine.architectures import small_model
from tests.engine.test_engine import generate, reference
from tests.support.blocks import CountingGraphs, block_engine, block_runner
from tests.support.tiny import prompts, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_qwen3

# torch's compiler still uses what torch warns about.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

Make = Callable[[], PreTrainedModel]


def replies(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    return generate(engine, [Sequence(prompt, SamplingParams(), 12) for prompt in asked], every=2)


@pytest.mark.compiler
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gemma3, tiny_gpt_oss])
def test_compiled_layers_change_no_greedy_reply(make: Make, tmp_path: Path) -> None:
    model, asked = make(), prompts(20, 5, 33)
    expected = [reference(model, prompt, 12) for prompt in asked]
    join_linears(model, lambda: model(torch.tensor([[1, 2, 3]])), nn.Linear)
    graphs = CountingGraphs()
    engine = block_engine(model, 4, 64, graphs=graphs)
    assert replies(engine, asked) == expected
    before = graphs.captured
    block_runner(engine).compile(tmp_path)
    assert not engine.runner.compiled, "it is used from the next step on"
    assert replies(engine, asked) == expected
    assert engine.runner.compiled
    assert any((tmp_path / "layers").iterdir()), "later starts find the programs there"
    assert graphs.captured > before, "graphs of layers that were not compiled are dropped"


@pytest.mark.compiler
def test_nothing_is_compiled_once_the_layers_are_in_use(tmp_path: Path) -> None:
    engine = block_engine(tiny_llama(), 4, 64)
    block_runner(engine).compile(tmp_path)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    replies(engine, prompts(1, 20, 50))
    assert counted["unique_graphs"] == before


def test_the_engine_goes_on_while_its_layers_are_compiled(tmp_path: Path) -> None:
    model, asked = tiny_llama(), prompts(20, 30)
    expected = [reference(model, prompt, 12) for prompt in asked]
    engine = block_engine(model, 4, 64)
    runner = block_runner(engine)
    layers = CompiledLayers(model, backend="eager")
    inside, answered = threading.Event(), threading.Event()

    def run(tokens: int) -> torch.Tensor:
        inside.set()
        assert answered.wait(60)
        return runner._run_padding(tokens)

    thread = threading.Thread(target=layers.make, args=[run, tmp_path, Subprocesses()])
    thread.start()
    assert inside.wait(60)
    assert replies(engine, asked) == expected
    answered.set()
    thread.join()
    layers.use()
    assert replies(engine, asked) == expected


def test_a_compilation_ends_when_it_is_stopped(tmp_path: Path) -> None:
    model, stopped = tiny_llama(), Subprocesses()
    runner = block_runner(block_engine(model, 4, 64))
    stopped.stop()
    with pytest.raises(CompilationError, match="the server stops"):
        runner.compile(tmp_path, stopped)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_a_model_whose_layers_run_several_times_in_a_step_is_not_compiled(tmp_path: Path) -> None:
    engine = block_engine(small_model("hrm_text"), 2, 64)
    with pytest.raises(CompilationError, match="its layers run several times"):
        block_runner(engine).compile(tmp_path)


def test_a_model_without_a_list_of_layers_is_not_compiled() -> None:
    model = tiny_llama()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(CompilationError, match="it has no single list of layers"):
        CompiledLayers(model)
