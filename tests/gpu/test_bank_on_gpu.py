"""Passes that look up experts in a bank: bit-identical to weights on the GPU, eager and in graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.bank_model import BankModel
from support.gemms import GEMMS, Gemm, our_gemm
from support.groups import add_layers, fill_shards
from torch import Tensor

from vmm_dwdp import HOST, DWDPConfig, DWDPRuntime
from vmm_dwdp.kernels.triton import bank as kernels

pytestmark = pytest.mark.gpu

EXPERTS, HOST_EXPERTS, TOP_K, SIZE, LAYERS = 16, 13, 4, 768, 5  # 1.1 MiB an expert: page borders fall inside of experts
CONFIG = DWDPConfig(
    group_size=1, host_experts=HOST_EXPERTS, mode="auto", expert_bank=LAYERS * 2 * (8 << 20), checksums=True
)  # six or seven experts of each weight: fewer than three tokens choose


def random_weights(seed: int) -> dict[int, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        number: {
            name: torch.randn(EXPERTS, SIZE, SIZE, generator=generator).mul(SIZE**-0.5).bfloat16()
            for name in ("up", "down")
        }
        for number in range(LAYERS)
    }


class Model:
    """Two grouped GEMMs a layer, over experts of which most are in host memory, and over copies of them on the GPU.

    Attributes:
        banks: what the bank of each layer is to hold.
    """

    def __init__(self, rendezvous: Path, config: DWDPConfig = CONFIG) -> None:
        reference = random_weights(0)
        self.runtime = DWDPRuntime(config, 0, "cuda", rendezvous)
        add_layers(self.runtime, reference)
        fill_shards(self.runtime, reference)
        self.runtime.publish()
        self.whole = {number: {name: w.cuda() for name, w in ws.items()} for number, ws in reference.items()}
        bank = self.runtime.stats().bank
        assert bank is not None
        assert set(bank.rows.values()) <= {6, 7}
        self.banks = {number: BankModel(EXPERTS, rows, range(3)) for number, rows in bank.rows.items()}

    def forward(self, x: Tensor, chosen: Tensor, gemm: Gemm, mode: str = "in_place", pause: int = 0) -> Tensor:
        """``x`` ``[tokens * TOP_K, SIZE]``, a row for each of ``chosen``, int64 ``[LAYERS, tokens, TOP_K]``.

        The device waits for ``pause`` cycles between what it has looked up and what reads it.
        """
        for number in self.whole:
            with self.runtime.layer(number, mode=mode, tokens=chosen.shape[1]):  # type: ignore[arg-type]
                weights, rows = self.runtime.look_up(number, chosen[number])
                if pause:
                    torch.cuda._sleep(pause)  # type: ignore[no-untyped-call]
                x = layer(x, rows, gemm, weights)  # type: ignore[arg-type]
        return x

    def expected(self, x: Tensor, chosen: Tensor, gemm: Gemm) -> Tensor:
        for number, weights in self.whole.items():
            x = layer(x, chosen[number], gemm, weights)
        return x

    def follow(self, chosen: Tensor) -> None:
        """The banks' models after a pass in place."""
        for number, bank in self.banks.items():
            bank.look_up(chosen[number].flatten().tolist(), copies=chosen.shape[1] <= 32)

    def require_planned(self) -> None:
        """The device has planned what the models have, and rows have the bytes of their experts."""
        self.runtime.check_integrity(verify=True)
        tables = self.runtime._assembly.bank
        assert tables is not None
        for number, bank in self.banks.items():
            rows = enumerate(tables._tables[number].rows.tolist())
            assert {expert: row for expert, row in rows if row >= 0} == bank.row_of
            assert list(self.runtime.bank_counts()[number]) == bank.counts


def layer(x: Tensor, rows: Tensor, gemm: Gemm, weights: dict[str, Tensor]) -> Tensor:
    """The rows of ``x`` in the order of the experts' rows in the weights, and back."""
    in_order, order = rows.flatten().sort(stable=True)
    places = torch.arange(len(weights["up"]), device=x.device, dtype=rows.dtype)
    ends = torch.searchsorted(in_order, places, right=True).int()
    y = gemm(gemm(x[order], weights["up"], ends).tanh(), weights["down"], ends).tanh()
    return torch.empty_like(y).index_copy_(0, order, y)


def routed(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows ``[tokens * TOP_K, SIZE]``, and which experts they go to in each layer, from a routing of its own with
    favourites."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.rand(LAYERS, 1, EXPERTS, generator=torch.Generator().manual_seed(seed // 10)) * 2
    chosen = (torch.rand(LAYERS, tokens, EXPERTS, generator=generator) + favour).topk(TOP_K).indices
    x = torch.randn(tokens * TOP_K, SIZE, generator=generator).to("cuda", torch.bfloat16)
    return x, chosen.cuda()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    made = Model(tmp_path / "rendezvous")
    yield made
    assert made.runtime.close().open() == []


@GEMMS
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_passes_are_bit_identical_and_planned_as_the_model(model: Model, gemm: Gemm, tokens: int) -> None:
    for seed in range(30):
        x, chosen = routed(tokens, seed)
        assert torch.equal(model.forward(x, chosen, gemm), model.expected(x, chosen, gemm)), seed
        model.follow(chosen)
    model.require_planned()
    counts = model.runtime.bank_counts().values()
    assert all(count.uses > count.hits for count in counts)
    assert all(0 < count.hits < count.uses for count in counts) == (tokens < 64)  # which read all in place


def test_the_first_pass_of_all_may_be_captured(tmp_path: Path) -> None:
    """Whatever the process has compiled and loaded for other tests is forgotten."""
    for kernel in (kernels._plan, kernels._move):
        kernel.device_caches.clear()
    model = Model(tmp_path / "rendezvous")
    _, chosen = routed(3, 0)
    graph = torch.cuda.CUDAGraph()
    read = {}
    with torch.cuda.graph(graph):
        for number in range(LAYERS):
            with model.runtime.layer(number, mode="in_place", tokens=3):
                weights, rows = model.runtime.look_up(number, chosen[number])
                read[number] = weights["up"][rows.flatten()]  # type: ignore[index]
            del weights
    for _ in range(2):
        graph.replay()
        model.follow(chosen)
        for number, found in read.items():
            assert torch.equal(found, model.whole[number]["up"][chosen[number].flatten()])
    model.require_planned()
    assert model.runtime.close().open() == []


@GEMMS
def test_a_hundred_replays_with_changing_routing_are_bit_identical(model: Model, gemm: Gemm) -> None:
    x, chosen = routed(3, 0)
    model.forward(x, chosen, gemm)  # whatever is compiled or allocated once
    model.follow(chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model.forward(x, chosen, gemm)
    model.require_planned()  # a capture has changed nothing
    for seed in range(100):
        for held, fresh in zip((x, chosen), routed(3, seed), strict=True):
            held.copy_(fresh)
        graph.replay()
        model.follow(chosen)
        assert torch.equal(y, model.expected(x, chosen, gemm)), seed
        if seed % 10 == 0:  # staged and eager passes in between, as prefill is
            model.require_planned()
            for tokens, mode in ((64, "staged"), (64, "in_place"), (2, "in_place")):
                given = routed(tokens, seed + 1)
                assert torch.equal(model.forward(*given, gemm, mode), model.expected(*given, gemm)), (seed, mode)
                if mode == "in_place":
                    model.follow(given[1])
    model.require_planned()


def test_replays_after_an_update_and_after_sleep_read_the_new_bytes(model: Model) -> None:
    x, chosen = routed(3, 0)
    model.forward(x, chosen, our_gemm)
    model.follow(chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model.forward(x, chosen, our_gemm)
    for age in range(1, 6):
        if age % 2:
            reference = random_weights(age)
            model.runtime.update(
                {
                    (number, name, owner): w[experts.start : experts.stop]
                    for number, ws in reference.items()
                    for name, w in ws.items()
                    for owner in (0, HOST)
                    for experts in [model.runtime.local_experts(number, owner)]
                }
            )
            model.whole = {number: {name: w.cuda() for name, w in ws.items()} for number, ws in reference.items()}
        else:
            model.runtime.sleep()
            model.runtime.wake()
        for bank in model.banks.values():
            bank.row_of.clear()
        model.require_planned()
        for seed in range(5):
            for held, fresh in zip((x, chosen), routed(3, seed), strict=True):
                held.copy_(fresh)
            graph.replay()
            model.follow(chosen)
            assert torch.equal(y, model.expected(x, chosen, our_gemm)), (age, seed)
        model.require_planned()


def test_passes_on_two_streams_follow_each_other(model: Model) -> None:
    """On one of them the device is slow to read what it has looked up, which the other may not exchange meanwhile."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    given = [routed(2, 10 * seed) for seed in range(12)]
    model.forward(*given[0], our_gemm)  # whatever is compiled once
    torch.cuda.synchronize()
    found = []
    for place, (x, chosen) in enumerate(given):
        with torch.cuda.stream(streams[place % 2]):
            found.append(model.forward(x, chosen, our_gemm, pause=0 if place % 2 else 5_000_000))
    torch.cuda.synchronize()
    for place, (x, chosen) in enumerate(given):
        assert torch.equal(found[place], model.expected(x, chosen, our_gemm)), place
    model.runtime.check_integrity(verify=True)


def test_more_experts_than_rows_are_read_in_place_besides(tmp_path: Path) -> None:
    """Eight tokens use nearly all experts; the bank has room for four."""
    config = replace(CONFIG, expert_bank=LAYERS * 2 * (6 << 20))
    runtime = DWDPRuntime(config, 0, "cuda", tmp_path / "rendezvous")
    reference = random_weights(0)
    add_layers(runtime, reference)
    fill_shards(runtime, reference)
    runtime.publish()
    bank = runtime.stats().bank
    assert bank is not None
    assert set(bank.rows.values()) <= {4, 5}
    whole = {name: w.cuda() for name, w in reference[0].items()}
    for seed in range(20):
        x, chosen = routed(8, seed)
        with runtime.layer(0, mode="in_place"):
            weights, rows = runtime.look_up(0, chosen[0])
            y = layer(x, rows, our_gemm, weights)  # type: ignore[arg-type]
        assert torch.equal(y, layer(x, chosen[0], our_gemm, whole)), seed
        del weights
    runtime.check_integrity(verify=True)
    assert runtime.close().open() == []
