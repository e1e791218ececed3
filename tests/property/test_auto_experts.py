"""As many experts as fit, against a count of pages; what all settle on fits on each, and neighbours overlap evenly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.room import Counted

from vmm_dwdp import DWDPConfig, ExpertPlacement, WeightSpec
from vmm_dwdp.layout.auto import AutoExperts, Room
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.needs import MemoryNeeded, memory_needed


@st.composite
def groups(draw: st.DrawFn) -> Counted:
    experts = draw(st.integers(1, 12))
    alike = draw(st.booleans())
    weights = st.lists(st.integers(1, 90), min_size=1, max_size=2).map(tuple)
    first = draw(weights)
    layers = [
        (experts if alike else draw(st.integers(max(1, experts - 2), experts)), first if alike else draw(weights))
        for _ in range(draw(st.integers(1, 4)))
    ]
    hosted = draw(st.integers(0, min(count for count, _ in layers)))
    return Counted(layers, draw(st.integers(1, 4)), draw(st.integers(1, 3)), 16, hosted, draw(st.sampled_from([0, 64])))


def auto_of(group: Counted) -> AutoExperts:
    config = DWDPConfig(
        group_size=group.group_size,
        num_local_experts="auto",
        prefetch_depth=group.depth,
        host_experts=group.host_experts,
        mode="in_place" if group.cache else "staged",
        resident_cache=group.cache,
    )
    return AutoExperts(config, tuple(experts for experts, _ in group.layers))


def needed_by(group: Counted, rank: int, config: DWDPConfig) -> MemoryNeeded:
    layers = [
        describe_layer(
            number,
            {f"w{i}": WeightSpec((experts, nbytes), torch.uint8) for i, nbytes in enumerate(weights)},
            config,
            rank,
            group.page,
        )
        for number, (experts, weights) in enumerate(group.layers)
    ]
    return memory_needed(layers, config, rank)


def offer(group: Counted, rank: int, room: Room) -> int | str:
    """What the rank offers, in the words of the reference."""
    auto = auto_of(group)
    found = auto.most_that_fit(lambda config: needed_by(group, rank, config), room)
    if found is None:
        return "none"
    return "equal" if auto.settled(found).num_local_experts is None else found


@given(groups(), st.data())
def test_as_many_as_fit_on_each_rank(group: Counted, data: st.DataObject) -> None:
    for rank in range(group.group_size):
        everything = group.takes(rank, None) * group.group_size
        wanted = data.draw(st.integers(0, 2 * everything))
        limit = data.draw(st.integers(wanted, 3 * everything))
        assert offer(group, rank, Room(wanted, limit)) == group.most(rank, wanted, limit)


@given(groups(), st.data())
def test_what_all_settle_on_fits_on_each_and_overlaps_evenly(group: Counted, data: st.DataObject) -> None:
    """Each rank has its own room; the least of their offers is all's."""
    auto = auto_of(group)
    rooms = [Room(wanted := data.draw(st.integers(0, 1 << 13)), wanted + (1 << 13)) for _ in range(group.group_size)]
    offers = [
        auto.most_that_fit(lambda config, rank=rank: needed_by(group, rank, config), room)  # type: ignore[misc]
        for rank, room in enumerate(rooms)
    ]
    numbers = [number for number in offers if number is not None]
    if len(numbers) < group.group_size:
        return
    config = auto.settled(min(numbers))
    number = config.num_local_experts
    assert number != "auto"
    for rank, room in enumerate(rooms):
        assert group.takes(rank, number) <= (room.limit if number is None else room.wanted)
    for experts, _ in group.layers:
        held = [ExpertPlacement(experts, config).experts(rank) for rank in range(group.group_size)]
        assert {len(run) for run in held} == {group.share(experts) if number is None else number}
        assert set().union(*held) == set(range(experts - group.host_experts))
        steps = {after.start - before.start for before, after in itertools.pairwise(held)}
        assert not steps or max(steps) - min(steps) <= 1


@given(groups(), st.data())
def test_what_does_not_fit_on_ranks_goes_to_host_memory(group: Counted, data: st.DataObject) -> None:
    """And no more: one expert more on each rank would not fit, by a count of pages."""
    experts = group.layers[0][0]
    group = group._replace(layers=[(experts, weights) for _, weights in group.layers], host_experts=0)
    auto = replace(auto_of(group), spills=True)
    room = data.draw(st.integers(0, 2 * group.takes(0, None) * group.group_size))
    rank = data.draw(st.integers(0, group.group_size - 1))

    found = auto.most_that_fit(lambda config: needed_by(group, rank, config), Room(room, room))

    def takes(number: int) -> int:
        host = max(0, experts - number * group.group_size)
        return group._replace(host_experts=host).takes(rank, number if host == 0 else None)

    if found is None:
        assert takes(0) > room
        return
    config = auto.settled(found)
    assert config.host_experts == max(0, experts - found * group.group_size)
    assert {len(ExpertPlacement(experts, config).experts(each)) for each in range(group.group_size)} == {found}
    assert max(map(takes, range(found + 1))) <= room
    assert found == experts or takes(found + 1) > room
