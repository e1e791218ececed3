"""Memory of a GPU given back and taken again: it is free meanwhile, and graphs replay afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.groups import Model, add_layers, check_pass, fill_shards, in_threads, random_model

from vmm_dwdp import DriverError, DWDPConfig, DWDPRuntime, StateError

pytestmark = pytest.mark.gpu

EXPERTS, SIZE, LAYERS = 8, 1024, 5  # 2 MiB an expert and a bit: page borders inside of experts
OLD: Model = random_model({n: {"w": ((EXPERTS, SIZE + 1, SIZE), torch.bfloat16)} for n in range(LAYERS)}, seed=1)


@contextmanager
def group(config: DWDPConfig, rendezvous: Path) -> Iterator[list[DWDPRuntime]]:
    """All ranks in this process, on one GPU."""

    def join(rank: int) -> DWDPRuntime:
        runtime = DWDPRuntime(config, rank, "cuda", rendezvous)
        add_layers(runtime, OLD)
        fill_shards(runtime, OLD)
        runtime.publish()
        return runtime

    runtimes = in_threads(join, config.group_size)
    yield runtimes
    assert [runtime.close().open() for runtime in runtimes] == [[]] * config.group_size


def together(runtimes: list[DWDPRuntime], call: Callable[[DWDPRuntime], None]) -> None:
    in_threads(lambda rank: call(runtimes[rank]), len(runtimes))


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize(
    "config",
    [
        DWDPConfig(group_size=1, host_experts=5),
        DWDPConfig(group_size=2, num_local_experts=5, mode="auto", resident_cache=8 << 20),
        DWDPConfig(group_size=3, host_experts=2, mode="in_place"),
    ],
    ids=["host memory", "overlap and cache", "three"],
)
@pytest.mark.parametrize("keep", [True, False])
def test_its_memory_is_free_meanwhile(config: DWDPConfig, keep: bool, tmp_path: Path) -> None:
    with group(config, tmp_path) as runtimes:
        for runtime in runtimes:
            check_pass(runtime, OLD, tokens=5)
            runtime.reset()
        taken = sum(runtime.stats().staged_bytes + runtime.memory_needed().resident for runtime in runtimes)
        taken += config.resident_cache * config.group_size
        before = free()
        for _ in range(2):
            together(runtimes, lambda runtime: runtime.sleep(keep=keep))
            assert free() - before >= taken * 0.99
            together(runtimes, lambda runtime: runtime.wake())
            assert abs(free() - before) <= taken * 0.02
            if not keep:
                with pytest.raises(StateError, match="weights are gone"):
                    runtimes[0].acquire(0, tokens=5)
                break
            for runtime in runtimes:
                check_pass(runtime, OLD, tokens=5)
                runtime.check_integrity()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_graphs_that_were_captured_before_replay_after(mode: str, tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2, host_experts=2, mode="in_place")
    with group(config, tmp_path) as runtimes:
        runtime = runtimes[0]
        x = torch.randn(4, SIZE, device="cuda", dtype=torch.bfloat16)

        def forward() -> torch.Tensor:
            y = x
            for number in OLD:
                with runtime.layer(number, mode=mode, tokens=4) as weights:  # type: ignore[arg-type]
                    whole = weights["w"]
                    assert isinstance(whole, torch.Tensor)
                    finite = whole.view(torch.int16).bitwise_and(0x3FFF).view(torch.bfloat16)  # the bytes are random
                    y = torch.tanh(torch.einsum("tk,enk->tn", y, finite)[:, :SIZE])
            return y

        eager = forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = forward()
        graph.replay()
        assert torch.equal(y, eager)
        for _ in range(2):
            torch.cuda.synchronize()
            together(runtimes, lambda runtime: runtime.sleep())
            together(runtimes, lambda runtime: runtime.wake())
            y.zero_()
            graph.replay()
            assert torch.equal(y, eager)
            assert torch.equal(forward(), eager)
        del graph, y


def test_a_capture_is_no_place_to_sleep(tmp_path: Path) -> None:
    with group(DWDPConfig(group_size=1, host_experts=3), tmp_path) as (runtime,):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda")
            for call in (runtime.sleep, runtime.wake):
                with pytest.raises(StateError, match="between replays of a graph, not in a capture"):
                    call()
        check_pass(runtime, OLD)


def test_memory_that_somebody_else_has_taken_meanwhile(tmp_path: Path) -> None:
    with group(DWDPConfig(group_size=1, host_experts=3), tmp_path) as (runtime,):
        runtime.sleep()
        theirs = []
        while (left := free()) > 32 << 20:  # in another's hands, and not in torch's cache
            theirs.append(torch.empty(left - (16 << 20), dtype=torch.uint8, device="cuda"))
        with pytest.raises(DriverError, match=r"OUT_OF_MEMORY .*: rank 0 needs .* are free on cuda"):
            runtime.wake()
        assert runtime.asleep
        del theirs  # torch keeps it for later, until there is no room
        runtime.wake()
        check_pass(runtime, OLD)
