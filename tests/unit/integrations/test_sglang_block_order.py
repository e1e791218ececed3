"""The order in which SGLang's products go through experts, against a sort of tokens by expert in plain lists."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.sorted_blocks import NOTHING, align
from test_sglang_bank import EXPERTS, LAYERS, dispatched, loaded, module, opened  # noqa: F401

from vmm_dwdp import DWDPConfig, ExpertPlacement
from vmm_dwdp.integrations.sglang import hooks
from vmm_dwdp.integrations.sglang.block_order import BlockOrder

CPU = torch.device("cpu")


def in_blocks(aligned: Any, block_size: int) -> list[tuple[int, tuple[int, ...]]]:
    places, blocks, padded = (each.tolist() for each in aligned)
    assert blocks[padded[0] // block_size :] == list(NOTHING)
    return [
        (blocks[first // block_size], tuple(places[first : first + block_size]))
        for first in range(0, padded[0], block_size)
    ]


def owner_of(placement: ExpertPlacement, reader: int, expert: int) -> object:
    if expert in placement.experts(reader):
        return reader
    return next(source.owner for source in placement.sources(reader) if expert in source.experts)


@given(st.data())
def test_blocks_are_the_same_and_their_owners_take_turns(data: st.DataObject) -> None:
    ranks, each = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    experts, rows, reader = ranks * each, data.draw(st.sampled_from([0, 3])), data.draw(st.integers(0, ranks - 1))
    placement = ExpertPlacement(experts, DWDPConfig(group_size=ranks))
    order = BlockOrder(placement, reader, [rows], CPU)
    size = data.draw(st.sampled_from([1, 4]))
    ids = data.draw(st.lists(st.integers(-1, rows + experts - 1), max_size=30))
    chosen = torch.tensor(ids, dtype=torch.int32).view(-1, 1)

    before = in_blocks(align(chosen, size, rows + experts), size)
    after = in_blocks(order.align(align, chosen, size, rows + experts), size)

    assert Counter(after) == Counter(before)
    read = [expert for expert, _ in after]
    assert read[: read.count(-1)] == [-1] * read.count(-1)
    banked = [expert for expert in read if 0 <= expert < rows]
    assert banked == sorted(banked)
    turns = list(dict.fromkeys(expert - rows for expert in read if expert >= rows))
    assert turns == [expert for expert in placement.in_turn(reader) if expert in turns]


def test_where_all_experts_are_chosen_every_rank_reads_from_another_owner() -> None:
    placement = ExpertPlacement(12, DWDPConfig(group_size=4))
    every = torch.arange(12, dtype=torch.int32).view(1, -1)
    read = []
    for reader in range(4):
        blocks = in_blocks(BlockOrder(placement, reader, (), CPU).align(align, every, 1, 12), 1)
        read.append([owner_of(placement, reader, expert) for expert, _ in blocks])
    assert read[0] == [0, 1, 2, 3] * 3
    assert all(len(set(at_once)) == 4 for at_once in zip(*read, strict=True))


def test_layers_with_another_number_of_experts_keep_their_order() -> None:
    order = BlockOrder(ExpertPlacement(12, DWDPConfig(group_size=4)), 1, (), CPU)
    chosen = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    assert in_blocks(order.align(align, chosen, 1, 5), 1) == [(1, (1,)), (2, (2,)), (3, (0,))]


def test_without_a_manager_sglang_sorts_as_ever() -> None:
    assert hooks.manager() is None
    chosen = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    assert in_blocks(hooks.align_blocks(align, chosen, 1, 4), 1) == [(1, (1,)), (2, (2,)), (3, (0,))]


@pytest.mark.parametrize("reader", range(3))
def test_what_is_held_twice_is_read_where_it_is_own(reader: int) -> None:
    placement = ExpertPlacement(9, DWDPConfig(group_size=3, num_local_experts=5, host_experts=1))
    owners = [owner_of(placement, reader, expert) for expert in placement.in_turn(reader)]
    assert Counter(owners)[reader] == 5
    assert owners[0] == reader


def sorted_in(manager: Any, module: Any, chosen: torch.Tensor) -> list[int]:
    """The experts of blocks that SGLang's products come to while they run a layer."""
    seen: list[int] = []

    def run(layer: Any, dispatch_output: Any) -> None:
        with mock.patch.object(hooks, "manager", return_value=manager):
            seen.extend(expert for expert, _ in in_blocks(hooks.align_blocks(align, chosen, 1, EXPERTS), 1))

    manager._apply(manager._layers[module.layer_id], run, module, dispatched(*map(tuple, chosen.tolist())))
    return seen


@pytest.mark.parametrize(
    ("runner", "mode", "tokens", "turns"),
    [
        ("triton", "in_place", 8, True),
        ("triton", "auto", 1, True),
        ("triton", "auto", 8, False),
        ("triton", "staged", 8, False),
        ("marlin", "in_place", 8, False),
    ],
)
def test_a_layer_that_is_read_in_place_by_triton_has_them_in_turn(
    runner: str,
    mode: Any,
    tokens: int,
    turns: bool,
    opened: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DWDPConfig(group_size=1, host_experts=4, mode=mode, prefetch_depth=0 if mode == "in_place" else 1)
    modules = [module(number, runner) for number in range(LAYERS)]
    manager = opened(config, modules)
    loaded(manager, modules, monkeypatch)
    placement = ExpertPlacement(EXPERTS, config)
    for each in modules:
        every = torch.arange(EXPERTS, dtype=torch.int32)
        order = list(placement.in_turn(0)) if turns else every.tolist()
        assert sorted_in(manager, each, every.view(tokens, -1)) == order
    assert placement.in_turn(0) == (0, 4, 1, 5, 2, 6, 3, 7)
