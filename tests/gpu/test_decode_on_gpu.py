"""Grouped GEMMs that read weights in place: bit-identical to weights on the GPU, eager and in graphs, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.gemms import GEMMS, Gemm, torch_gemm
from support.groups import add_layers, fill_shards
from torch import Tensor

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.config import ModeSetting

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, SIZE, LAYERS = 16, 4, 768, 5  # 1.1 MiB an expert: page borders fall inside of experts


class Model:
    """Two grouped GEMMs a layer, over experts of which most are in host memory, and over copies of them on the GPU."""

    def __init__(self, rendezvous: Path, resident_cache: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        reference = {
            number: {
                name: torch.randn(EXPERTS, SIZE, SIZE, generator=generator).mul(SIZE**-0.5).bfloat16()
                for name in ("up", "down")
            }
            for number in range(LAYERS)
        }
        config = DWDPConfig(group_size=1, host_experts=13, mode="auto", resident_cache=resident_cache)
        self.runtime = DWDPRuntime(config, 0, "cuda", rendezvous)
        add_layers(self.runtime, reference)
        fill_shards(self.runtime, reference)
        self.runtime.publish()
        self.whole = {number: {name: w.cuda() for name, w in ws.items()} for number, ws in reference.items()}

    def forward(self, x: Tensor, ends: Tensor, gemm: Gemm, mode: ModeSetting) -> Tensor:
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
        for number in self.whole:
            chosen = torch.searchsorted(ends[number], rows, right=True)  # rows are in the order of their experts
            with self.runtime.layer(
                number, mode=mode, tokens=len(x) // TOP_K, top_k=TOP_K, chosen=chosen.view(-1, TOP_K)
            ) as weights:
                x = self._layer(x, ends[number], gemm, weights)
        return x

    def expected(self, x: Tensor, ends: Tensor, gemm: Gemm) -> Tensor:
        for number, weights in self.whole.items():
            x = self._layer(x, ends[number], gemm, weights)
        return x

    @staticmethod
    def _layer(x: Tensor, ends: Tensor, gemm: Gemm, weights: dict[str, Tensor]) -> Tensor:
        return gemm(gemm(x, weights["up"], ends).tanh(), weights["down"], ends).tanh()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = Model(tmp_path_factory.mktemp("group") / "rendezvous")
    yield made
    assert made.runtime.close().open() == []


def routed(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows ``[tokens * TOP_K, SIZE]`` and, for every layer, where each expert's rows end, from a routing of its own."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(LAYERS, tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].reshape(LAYERS, -1)
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.long).scatter_add_(1, chosen, torch.ones_like(chosen))
    x = torch.randn(tokens * TOP_K, SIZE, generator=generator).to("cuda", torch.bfloat16)
    return x, counts.cumsum(1).int().cuda()


@GEMMS
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_reading_in_place_is_bit_identical(model: Model, gemm: Gemm, tokens: int) -> None:
    for seed in range(5):
        x, ends = routed(tokens, seed)
        assert torch.equal(model.forward(x, ends, gemm, "in_place"), model.expected(x, ends, gemm)), seed


@GEMMS
def test_a_hundred_replays_with_changing_routing_are_bit_identical(model: Model, gemm: Gemm) -> None:
    x, ends = routed(3, 0)
    model.forward(x, ends, gemm, "in_place")  # whatever is compiled or allocated once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model.forward(x, ends, gemm, "in_place")
    for seed in range(100):
        for held, fresh in zip((x, ends), routed(3, seed), strict=True):
            held.copy_(fresh)
        graph.replay()
        assert torch.equal(y, model.expected(x, ends, gemm)), seed
        if seed % 10 == 0:  # a staged pass in between, as prefill is
            prefill = routed(64, seed)
            assert torch.equal(model.forward(*prefill, gemm, "staged"), model.expected(*prefill, gemm)), seed


@GEMMS
def test_a_cache_refreshed_between_replays_leaves_every_bit(gemm: Gemm, tmp_path: Path) -> None:
    """Of 10 MiB, where the experts in host memory have 146: so each refresh, after other routings, changes it."""
    model = Model(tmp_path / "rendezvous", resident_cache=10 << 20)
    x, ends = routed(3, 0)
    model.forward(x, ends, gemm, "in_place")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model.forward(x, ends, gemm, "in_place")
    served = []
    for seed in range(40):
        for held, fresh in zip((x, ends), routed(3, seed % 8), strict=True):
            held.copy_(fresh)
        graph.replay()
        assert torch.equal(y, model.expected(x, ends, gemm)), seed
        if seed % 5 == 0:  # with the replay in flight
            model.runtime.refresh_cache()
            model.runtime.check_integrity()
            cache = model.runtime.stats().cache
            assert cache is not None
            assert cache.used_bytes == cache.nbytes == 10 << 20
            served.append(cache.served)
            prefill = routed(64, seed)
            for mode in ("in_place", "staged"):
                assert torch.equal(model.forward(*prefill, gemm, mode), model.expected(*prefill, gemm)), (seed, mode)
    assert served[0] == 0
    assert all(0 < (part or 0) < 1 for part in served[1:])
    assert model.runtime.close().open() == []


def test_passes_that_auto_chooses_are_bit_identical(model: Model) -> None:
    before = model.runtime.stats()
    for seed in range(60):
        x, ends = routed((1, 6, 1024)[seed // 20], seed)
        assert torch.equal(model.forward(x, ends, torch_gemm, "auto"), model.expected(x, ends, torch_gemm)), seed
    after = model.runtime.stats()
    assert after.in_place > before.in_place
    assert after.hits > before.hits
    assert after.misses == before.misses
    assert after.mode_choice is not None
    assert any(len(seconds) == 2 for seconds in after.mode_choice.seconds.values()), "nothing was tried in both modes"


def test_a_graph_keeps_the_mode_with_which_it_was_captured(model: Model) -> None:
    for tokens, in_place in ((1, LAYERS), (4096, 0)):
        x, ends = routed(tokens, 0)
        model.forward(x, ends, torch_gemm, "auto")
        before, graph = model.runtime.stats().in_place, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model.forward(x, ends, torch_gemm, "auto")
        assert model.runtime.stats().in_place == before + in_place
        graph.replay()
        assert torch.equal(y, model.expected(x, ends, torch_gemm))
