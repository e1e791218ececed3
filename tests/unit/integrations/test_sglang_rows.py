"""Marlin and triton_kernels with a bank, where there is neither: what they read, and that nothing is in another order.

What they are told they look at here as their kernels do: weights by address, however long their tensors say they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.sorted_blocks import align
from test_sglang_bank import CONFIG, EXPERTS, LAYERS, ROWS, Routed, dispatched, loaded, module, opened  # noqa: F401
from torch import Tensor

from vmm_dwdp import StateError
from vmm_dwdp.integrations.sglang import rows

CHOSEN = [((2, 5),), ((5, 7), (2, 5)), ((0, 6),), ((6, 7), (1, 3), (6, 1)), tuple([(2, 3)] * 33)]
BLOCKS = (2, 4)  # tokens of a block


def by_address(tensor: Tensor) -> Tensor:
    """All rows that lie in a row where ``tensor`` begins."""
    return tensor.as_strided((ROWS + EXPERTS, *tensor.shape[1:]), tensor.stride())


def require_experts(layer: Any, experts: dict[str, Tensor], told: Tensor, chosen: Tensor) -> None:
    for name, whole in experts.items():
        assert torch.equal(by_address(layer._parameters[name])[told], whole[chosen]), name


def banked(
    runner: str,
    apply: Any,
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[Any], Any]:
    """Loaded layers with a bank whose kernels are ``apply``, each with the whole of its experts; and their manager."""
    modules = [module(number, runner) for number in range(LAYERS)]
    for each in modules:
        each.quant_method.apply = apply
    manager = opened(CONFIG, modules)
    for each, experts in zip(modules, loaded(manager, modules, monkeypatch), strict=True):
        each.whole = experts
    return modules, manager


# -- Marlin ------------------------------------------------------------------------------------------------------------
def by_marlin(layer: Any, dispatch_output: Any) -> Any:
    """The row of every choice, and the choices in the order of blocks."""
    ids = dispatch_output.topk_output.topk_ids
    tokens, experts, [count, _] = rows.tell_blocks(align, ids, BLOCKS[0])
    told, order = torch.full((ids.numel(),), -1), []
    for place, row in enumerate(experts[: count // BLOCKS[0]].tolist()):
        block = [each for each in tokens[place * BLOCKS[0] :][: BLOCKS[0]].tolist() if each < ids.numel()]
        told[block] = row
        order += block
    assert len(layer.w13_weight) == len(layer.w2_weight_scale) == layer.num_experts == EXPERTS  # go by these
    require_experts(layer, layer.whole, told, ids.flatten().long())
    return told, order


def test_blocks_of_marlin_are_told_rows_and_stay_in_the_order_of_experts(
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules, manager = banked("marlin", by_marlin, opened, monkeypatch)
    for chosen in CHOSEN * 2:
        for each in modules:
            told, order = each.quant_method.apply(layer=each, dispatch_output=dispatched(*chosen))
            ids = torch.tensor(chosen).flatten()
            assert order == ids.argsort(stable=True).tolist()
            assert not torch.equal(told, ids)
    assert all(0 < counts.hits < counts.uses for counts in manager.runtime.bank_counts().values())
    assert rows.tell_blocks(align, torch.tensor([[3, 1]]), 2)[1][:2].tolist() == [1, 3]  # nobody awaits rows


def test_a_marlin_that_was_told_no_rows_has_read_other_experts(
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = [module(number, "marlin") for number in range(LAYERS)]
    modules[0].quant_method.apply = lambda layer, dispatch_output: None
    manager = opened(CONFIG, modules)
    loaded(manager, modules, monkeypatch)
    with pytest.raises(StateError, match="Marlin's blocks were not told their rows"):
        modules[0].quant_method.apply(layer=modules[0], dispatch_output=dispatched((2, 5)))
    assert rows.tell_blocks(align, torch.tensor([[3, 1]]), 2)[1][:2].tolist() == [1, 3]


# -- triton_kernels ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Slices:
    """As triton_kernels' `RaggedTensorMetadata`."""

    slice_sizes: Tensor
    slice_offs: Tensor
    block_offs_data: Tensor
    block_schedule_data: Tensor


@dataclass(frozen=True)
class RoutingData:
    """As triton_kernels' of 0.5.17."""

    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: Slices


def slices_of(ids: Tensor) -> Slices:
    sizes = ids.flatten().bincount(minlength=EXPERTS)
    schedules, offsets = [], []
    for block in BLOCKS:
        counts = (sizes + block - 1) // block
        words = [expert | place << 16 for expert, count in enumerate(counts) for place in range(count)]
        schedules.append(words + [-1] * (ids.numel() - len(words)))
        offsets.append([0, *counts.cumsum(0)])
    made = sizes, [0, *sizes.cumsum(0)], offsets, schedules
    return Slices(*(torch.as_tensor(each, dtype=torch.int32) for each in made))


def blocks(slices: Slices, num_slices: int, of: int) -> Iterator[tuple[int, range]]:
    """What a kernel reads in its order: which slice, and which places among the sorted tokens."""
    for word in slices.block_schedule_data[of][: slices.block_offs_data[of, num_slices]].tolist():
        name, place = word & 0xFFFF, word >> 16
        size = slices.slice_sizes.as_strided((), (), name).item()  # by address
        first = slices.slice_offs[name].item()
        yield name, range(first + place * BLOCKS[of], first + min(size, (place + 1) * BLOCKS[of]))


class Routing0_5_17(Routed):
    @classmethod
    def of(cls, ids: Tensor) -> Any:
        slices = slices_of(ids)
        return cls(routing_data=RoutingData(slices.slice_sizes, EXPERTS, ids.shape[1], slices), gather_indx=None)

    def slices(self) -> tuple[Slices, int]:
        data = self.routing_data
        assert data.expt_hist is data.expt_data.slice_sizes
        return data.expt_data, data.n_expts_tot


class Routing0_5_23(Routed):
    @classmethod
    def of(cls, ids: Tensor) -> Any:
        return cls(a_ragged_metadata=slices_of(ids), gather_indx=None, n_expts_act=ids.shape[1])

    def slices(self) -> tuple[Slices, int]:
        return self.a_ragged_metadata, ROWS + EXPERTS  # goes by the weights here


def by_triton_kernels(layer: Any, dispatch_output: Any) -> Any:
    slices, num_slices = type(layer.routed).slices(dispatch_output.topk_output)
    assert len(slices.slice_sizes) == EXPERTS  # by which tiles are chosen
    assert len(layer.w13_weight) == ROWS + EXPERTS  # a tensor map ends there
    ids = layer.ids.flatten().sort().values
    ordinary = layer.routed.slices()[0]
    for of in range(len(BLOCKS)):
        found = list(blocks(slices, num_slices, of))
        assert [places for _, places in found] == [places for _, places in blocks(ordinary, EXPERTS, of)]
        told = torch.full((len(ids),), -1)
        for name, places in found:
            told[list(places)] = name
        require_experts(layer, layer.whole, told, ids)
    return dispatch_output.topk_output


@pytest.mark.parametrize("routing", [Routing0_5_17, Routing0_5_23])
def test_slices_of_triton_kernels_are_called_as_rows_and_stay_in_the_order_of_experts(
    routing: Any,
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules, manager = banked("triton_kernel", by_triton_kernels, opened, monkeypatch)
    for chosen in CHOSEN * 2:
        for each in modules:
            each.ids = torch.tensor(chosen)
            each.routed = routing.of(each.ids)
            given = Routed(hidden_states=torch.zeros(len(chosen), 4), topk_output=each.routed)
            assert each.quant_method.apply(layer=each, dispatch_output=given).gather_indx is None
    assert all(0 < counts.hits < counts.uses for counts in manager.runtime.bank_counts().values())


def test_where_top_k_is_bypassed_experts_are_read_in_place_and_it_is_said_once(
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    modules = [module(number, "marlin") for number in range(LAYERS)]
    for each in modules:
        each.quant_method.apply = lambda layer, dispatch_output: layer.w13_weight.clone()
    manager = opened(CONFIG, modules)
    whole = loaded(manager, modules, monkeypatch)
    given = Routed(hidden_states=torch.zeros(1, 4), topk_output=Routed(router_logits=None))
    with caplog.at_level(logging.WARNING, "vmm_dwdp"):
        for each, experts in zip(modules, whole, strict=True):
            read = each.quant_method.apply(layer=each, dispatch_output=given)
            assert torch.equal(read, experts["w13_weight"])
    sentence = "experts are read in place without a bank: SGLang's Routed does not say which ones tokens chose"
    assert [record.getMessage() for record in caplog.records] == [sentence]
    assert all(counts.uses == 0 for counts in manager.runtime.bank_counts().values())
