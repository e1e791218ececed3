"""Two GPUs: runtimes on both in one thread, whatever device is current; and ranks that see only a GPU of their own."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.groups import Model, check_pass, in_threads, join, random_model

from vmm_dwdp import DriverError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator import open_driver
from vmm_dwdp.config import Mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ALONE = DWDPConfig(
    group_size=1, host_experts=4, mode="in_place", resident_cache=8 << 20, checksums=True, slice_bytes=1 << 20
)
PAIR = DWDPConfig(group_size=2, mode="in_place", checksums=True)
MODES: list[Mode] = ["staged", "in_place"]
LARGE = 32 << 20  # bytes of an expert


@functools.cache
def model_of(index: int) -> Model:
    shapes = {"w13": ((10, 700_001), torch.bfloat16), "w2": ((10, 300_007), torch.uint8)}
    return random_model(dict.fromkeys(range(4), shapes), seed=index)


@contextmanager
def device_unchanged() -> Iterator[None]:
    before = torch.cuda.current_device()
    yield
    assert torch.cuda.current_device() == before


def start(folder: Path, index: int) -> DWDPRuntime:
    """A group of its own on GPU ``index``."""
    return join(ALONE, 0, folder / f"group-{index}", model_of(index), open_driver(torch.device("cuda", index)))


def live(runtime: DWDPRuntime, model: Model) -> None:
    """Everything that is asked of a published runtime."""
    for mode in MODES:
        with device_unchanged():
            check_pass(runtime, model, mode=mode)
    chosen = torch.arange(10, device=runtime.device)[:, None]
    with device_unchanged():
        for number in model:
            runtime.acquire(number, mode="in_place", chosen=chosen)
            runtime.release(number)
        runtime.acquire(2, mode="staged")
        runtime.reset()
    with device_unchanged():
        runtime.refresh_cache()
        runtime.update({})
        runtime.check_integrity(verify=True)
        assert runtime.stats().hits > 0
    with device_unchanged(), runtime.trace(), device_unchanged():
        check_pass(runtime, model, mode="staged")
    with device_unchanged():
        check_pass(runtime, model, mode="in_place")


def whole_lives(folder: Path, device: int | None) -> None:
    """Two runtimes in this thread, whose current device is ``device``; None: as it is in a new thread."""
    if device is not None:
        torch.cuda.set_device(device)
    with device_unchanged():
        runtimes = [start(folder, index) for index in range(2)]
    for _ in range(2):
        for index, runtime in enumerate(runtimes):
            live(runtime, model_of(index))
    with device_unchanged():
        assert [runtime.close().open() for runtime in runtimes] == [[], []]


@pytest.mark.parametrize("device", [0, 1, None])
def test_runtimes_on_both_in_one_thread(device: int | None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(whole_lives, tmp_path, device).result()


@pytest.mark.parametrize("device", [0, 1])
def test_a_group_over_both_in_one_thread(device: int, tmp_path: Path) -> None:
    model = model_of(0)
    runtimes = in_threads(lambda rank: join(PAIR, rank, tmp_path, model, open_driver(torch.device("cuda", rank))), 2)
    with torch.cuda.device(device):
        for mode in MODES * 2:
            for runtime in runtimes:
                with device_unchanged():
                    check_pass(runtime, model, mode=mode)
        with device_unchanged():
            assert [runtime.close().open() for runtime in runtimes] == [[], []]


def test_a_stream_of_the_other_device_is_refused_and_one_of_its_own_is_not(tmp_path: Path) -> None:
    runtime = start(tmp_path, 1)
    own, other = (torch.cuda.Stream(device=index) for index in (1, 0))
    with torch.cuda.device(0):
        for mode in MODES:
            with pytest.raises(StateError, match="the stream is of cuda:0, but the weights are on cuda:1"):
                runtime.acquire(0, mode=mode, stream=other)
            weights = runtime.acquire(0, mode=mode, stream=own)["w2"]
            assert isinstance(weights, torch.Tensor)
            with torch.cuda.stream(own):
                found = weights.cpu()
            with pytest.raises(StateError, match="the stream is of cuda:0, but the weights are on cuda:1"):
                runtime.release(0, stream=other)
            runtime.release(0, stream=own)
            assert torch.equal(found, model_of(1)[0]["w2"])
            runtime.reset()
    del weights
    assert runtime.close().open() == []


@pytest.mark.parametrize("mode", MODES)
def test_a_capture_is_seen_while_the_other_device_is_current(mode: Mode, tmp_path: Path) -> None:
    runtime, model = start(tmp_path, 1), model_of(1)
    torch.zeros(1, device="cuda:0")  # no context can be made in a capture
    with torch.cuda.device(1):
        copied = [torch.zeros_like(weights["w2"], device="cuda") for weights in model.values()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in model:
                with torch.cuda.device(0), device_unchanged():
                    weights = runtime.acquire(number, mode=mode)["w2"]
                    assert isinstance(weights, torch.Tensor)
                    copied[number].copy_(weights)
                    runtime.release(number)
        for _ in range(3):
            for tensor in copied:
                tensor.zero_()
            graph.replay()
            assert all(torch.equal(copied[number].cpu(), model[number]["w2"]) for number in model)
            check_pass(runtime, model, mode=mode)
        del weights, graph
        assert runtime.close().open() == []


def fetch(folder: Path, rank: int, sees_all: bool, sender: Connection) -> None:
    """A rank in a process of its own: sends bytes a second of a large fetch, or why `publish` refused; checks bytes."""
    try:
        torch.cuda.set_device(rank if sees_all else 0)
        model = random_model({number: {"w": ((8, LARGE), torch.uint8)} for number in range(3)})
        config = DWDPConfig(group_size=2, prefetch_depth=1)
        try:
            runtime = join(config, rank, folder, model, open_driver(torch.device("cuda")))
        except DriverError as refusal:
            sender.send((None, str(refusal)))
            return
        check_pass(runtime, model)
        torch.cuda.synchronize()
        started = time.perf_counter()
        runtime.acquire(2)  # out of order: it is fetched now
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        runtime.release(2)
        check_pass(runtime, model)
        assert runtime.close().open() == []
        sender.send((4 * LARGE / seconds, None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
        raise


@pytest.mark.parametrize("sees_all", [True, False], ids=["sees all GPUs", "sees its own GPU only"])
def test_ranks_that_see_a_gpu_of_their_own(sees_all: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right bytes, or at set-up the sentence that says what to do. The log shows the rates side by side."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        if not sees_all:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible.split(",")[rank])
        process = context.Process(target=fetch, args=(tmp_path, rank, sees_all, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    told = [end.recv() if end.poll(200) else (None, "it said nothing for 200 seconds") for end in ends]
    for process in processes:
        process.join(20)
        process.kill()
        process.join()
    for rate, refusal in told:
        print(f"sees all: {sees_all}, {refusal or f'{rate / 1e9:.1f} GB/s'}")
        if rate is None:
            assert not sees_all, refusal
            assert "let all ranks see all GPUs" in refusal or "did not come" in refusal, refusal
