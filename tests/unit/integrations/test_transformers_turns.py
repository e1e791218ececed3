"""Several threads and one spread model: passes take turns, and each begins at its beginning."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.groups import PAGE
from support.moe_models import logits, prompt, tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from vmm_dwdp import DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.integrations.transformers import attach
from vmm_dwdp.integrations.transformers.turns import Turns

THREADS, PASSES = 4, 1000
PROMPTS = [torch.arange(3, 7)[None], torch.arange(20, 24)[None]]
LAYERS = 3


@pytest.fixture
def model(tmp_path: Path) -> Iterator[PreTrainedModel]:
    model = tiny_model("qwen3_moe")
    runtime = DWDPRuntime(DWDPConfig(group_size=1, host_experts=5), 0, "cpu", tmp_path / "r", driver=HostDriver(PAGE))
    with runtime:
        attach(model, runtime)
        yield model
        gc.collect()  # what a test has raised holds the frames, and they the tensors
    assert runtime.ledger.open() == []


@torch.no_grad()
def answer(model: PreTrainedModel, number: int) -> Tensor:
    out: Tensor = model(PROMPTS[number % 2], use_cache=False).logits
    return out


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def misses_of(model: PreTrainedModel, call: Callable[[], Any]) -> int:
    before = model.dwdp.stats().misses
    call()
    return int(model.dwdp.stats().misses - before)


def experts_of(model: PreTrainedModel, layer: int) -> Any:
    return model.get_submodule(f"model.layers.{layer}.mlp.experts")


def test_passes_of_four_threads_are_all_right(tmp_path: Path) -> None:
    whole = tiny_model("qwen3_moe", num_hidden_layers=1)
    wanted = [answer(whole, number) for number in range(2)]
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    config = DWDPConfig(group_size=1, host_experts=5, prefetch_depth=1)
    with DWDPRuntime(config, 0, "cpu", tmp_path / "r", driver=HostDriver(PAGE)) as runtime:
        attach(model, runtime)

        def passes(thread: int) -> int:
            return sum(torch.equal(answer(model, thread + n), wanted[(thread + n) % 2]) for n in range(PASSES))

        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(passes, range(THREADS))) == [PASSES] * THREADS


def test_no_pass_overlaps_another_whichever_model_of_it_is_called(model: PreTrainedModel) -> None:
    ran: list[int] = []
    act = experts_of(model, 0).act_fn.forward

    def recording(x: Tensor) -> Tensor:
        ran.append(threading.get_ident())
        return act(x)

    together = threading.Barrier(THREADS)

    def passes(thread: int) -> None:
        called = model if thread % 2 else model.model
        together.wait()
        for _ in range(20):
            with torch.no_grad():
                called(prompt(), use_cache=False)

    with ExitStack() as patched, ThreadPoolExecutor(THREADS) as pool:
        for layer in range(LAYERS):
            patched.enter_context(mock.patch.object(experts_of(model, layer).act_fn, "forward", side_effect=recording))
        list(pool.map(passes, range(THREADS)))
    per_pass = len(ran) // (20 * THREADS)
    assert per_pass >= LAYERS
    assert all(len(set(ran[at : at + per_pass])) == 1 for at in range(0, len(ran), per_pass))


def test_texts_of_two_threads_are_those_of_one(model: PreTrainedModel) -> None:
    whole = tiny_model("qwen3_moe")

    def generate(each: PreTrainedModel, number: int) -> Tensor:
        tokens: Tensor = each.generate(PROMPTS[number], max_new_tokens=12, do_sample=False)
        return tokens

    wanted = [generate(whole, number) for number in range(2)]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(generate, [model, model], range(2)))
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_after_a_pass_that_raised_every_thread_begins_anew(
    model: PreTrainedModel, layer: int, error: type[BaseException]
) -> None:
    wanted = answer(tiny_model("qwen3_moe"), 0)
    answer(model, 0)
    with mock.patch.object(experts_of(model, layer).act_fn, "forward", side_effect=error("mine")):
        for run in (lambda: answer(model, 0), lambda: in_a_thread(lambda: answer(model, 0))):
            with pytest.raises(error, match="mine"):
                run()
    found: list[Tensor] = []
    assert misses_of(model, lambda: found.append(in_a_thread(lambda: answer(model, 0)))) == 0
    assert misses_of(model, lambda: found.append(answer(model, 0))) == 0
    assert all(torch.equal(each, wanted) for each in found)


def test_the_users_exception_is_not_replaced_by_ours(model: PreTrainedModel) -> None:
    def close_and_raise(*_: Any) -> None:
        model.dwdp.close()
        raise ValueError("mine")

    with (
        mock.patch.object(experts_of(model, 1).act_fn, "forward", side_effect=close_and_raise),
        pytest.warns(ResourceWarning),
        pytest.raises(ValueError, match="mine") as raised,
    ):
        answer(model, 0)
    assert any("closed" in note for note in raised.value.__notes__)


def test_what_another_thread_left_in_the_middle_is_given_up(model: PreTrainedModel) -> None:
    """An experts module may be called alone, and a thread may end there."""
    wanted = answer(tiny_model("qwen3_moe"), 0)
    hidden = torch.randn(4, 32)
    chosen = torch.tensor([[0, 1]] * 4)

    def first_layer() -> None:
        with torch.no_grad():
            experts_of(model, 0)(hidden, chosen, torch.full((4, 2), 0.5))

    in_a_thread(first_layer)
    with mock.patch.object(model.dwdp, "reset", wraps=model.dwdp.reset) as reset:
        assert torch.equal(answer(model, 0), wanted)
        assert reset.call_count == 1
        assert torch.equal(answer(model, 0), wanted)
        assert torch.equal(in_a_thread(lambda: answer(model, 0)), wanted)
        assert reset.call_count == 1


def test_a_pass_whose_giving_up_failed_is_given_up_by_the_next(model: PreTrainedModel) -> None:
    wanted = answer(tiny_model("qwen3_moe"), 0)
    with (
        mock.patch.object(experts_of(model, 1).act_fn, "forward", side_effect=ValueError("mine")),
        mock.patch.object(model.dwdp, "reset", side_effect=StateError("not now")),
        pytest.raises(ValueError, match="mine") as raised,
    ):
        answer(model, 0)
    assert any("not now" in note for note in raised.value.__notes__)
    with mock.patch.object(model.dwdp, "reset", wraps=model.dwdp.reset) as reset:
        assert torch.equal(answer(model, 0), wanted)
    assert reset.call_count == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_even_while_a_pass_runs(model: PreTrainedModel) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait(x: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(60)
        return torch.nn.functional.silu(x)

    with ThreadPoolExecutor(1) as pool:
        with mock.patch.object(experts_of(model, 1).act_fn, "forward", side_effect=wait):
            running = pool.submit(answer, model, 0)
            assert inside.wait(60)
            child = os.fork()
            if child == 0:  # a child of a process with threads: nothing but the call, and out
                try:
                    answer(model, 0)
                except StateError:
                    os._exit(17)
                finally:
                    os._exit(1)
            leave.set()
            running.result()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def compiled(tmp_path: Path, name: str) -> tuple[Tensor, int]:
    """The logits of a compiled spread model, and the operations in what was compiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    config = DWDPConfig(group_size=1, host_experts=5)
    with DWDPRuntime(config, 0, "cpu", tmp_path / name, driver=HostDriver(PAGE)) as runtime:
        attach(model, runtime)
        with torch.no_grad():
            found = torch.compile(model, backend=counter)(prompt(), use_cache=False).logits
        torch._dynamo.reset()  # compiled code holds the tensors that it saw
    return found, counter.op_count


def test_taking_turns_takes_nothing_from_what_is_compiled(tmp_path: Path) -> None:
    found, operations = compiled(tmp_path, "with turns")
    with mock.patch.object(Turns, "taking", lambda self, forward: forward):
        _, without = compiled(tmp_path, "without")
    assert torch.equal(found, logits(tiny_model("qwen3_moe", num_hidden_layers=1)))
    assert operations >= without > 0


def test_a_model_made_and_run_in_any_gradient_mode(tmp_path: Path) -> None:
    wanted = logits(tiny_model("qwen3_moe"))
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for number, (made, run) in enumerate(itertools.product(modes, modes)):
        model = tiny_model("qwen3_moe")
        config = DWDPConfig(group_size=1, host_experts=5)
        with DWDPRuntime(config, 0, "cpu", tmp_path / str(number), driver=HostDriver(PAGE)) as runtime:
            with made():
                attach(model, runtime)
            for _ in range(2):
                with run():
                    assert torch.equal(model(prompt(), use_cache=False).logits, wanted)
