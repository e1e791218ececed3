"""Integers: who holds, who reads, which pages, which copies; against definitions counted expert by expert."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vmm_dwdp import HOST, DWDPConfig, ExpertPlacement
from vmm_dwdp.layout.copies import MAX_STREAMS, plan_layer
from vmm_dwdp.layout.ranges import RangeLayout
from vmm_dwdp.layout.slots import divide


@st.composite
def placements(draw: st.DrawFn, max_experts: int = 300) -> ExpertPlacement:
    num_experts = draw(st.integers(1, max_experts))
    group_size = draw(st.integers(1, 16))
    host_experts = draw(st.one_of(st.just(0), st.integers(0, num_experts)))
    on_ranks = num_experts - host_experts
    per_rank = draw(st.one_of(st.none(), st.integers(-(-on_ranks // group_size), on_ranks)))
    return ExpertPlacement(
        num_experts, DWDPConfig(group_size=group_size, num_local_experts=per_rank, host_experts=host_experts)
    )


@st.composite
def layouts(draw: st.DrawFn) -> RangeLayout:
    return RangeLayout(draw(placements(40)), draw(st.integers(1, 100)), draw(st.sampled_from([1, 16, 64, 256])))


@given(placements())
def test_every_rank_holds_a_run_that_follows_the_formula(placement: ExpertPlacement) -> None:
    config = placement.config
    on_ranks = placement.num_experts - config.host_experts
    per_rank = config.num_local_experts
    if per_rank is None:
        per_rank = (on_ranks + config.group_size - 1) // config.group_size
    for rank in range(config.group_size):
        first = rank * (on_ranks - per_rank) // max(1, config.group_size - 1)
        assert list(placement.experts(rank)) == list(range(first, first + per_rank))
    assert list(placement.experts(HOST)) == list(range(on_ranks, placement.num_experts))


@given(placements())
def test_locate_names_every_owner_and_every_expert_has_one(placement: ExpertPlacement) -> None:
    everyone = [*range(placement.config.group_size), HOST]
    for expert in range(placement.num_experts):
        found = placement.locate(expert)
        assert found
        assert found == [
            (owner, list(placement.experts(owner)).index(expert))
            for owner in everyone
            if expert in placement.experts(owner)
        ]


@given(placements())
def test_a_reader_reads_each_remote_expert_once_from_an_owner_of_it(placement: ExpertPlacement) -> None:
    for reader in range(placement.config.group_size):
        sources = placement.sources(reader)
        read = [expert for source in sources for expert in source.experts]
        assert read == [expert for expert in range(placement.num_experts) if expert not in placement.experts(reader)]
        assert all(expert in placement.experts(source.owner) for source in sources for expert in source.experts)


@given(placements(60))
def test_a_reader_takes_as_evenly_from_its_owners_as_whole_experts_allow(placement: ExpertPlacement) -> None:
    """No expert could come from another of its owners and leave the two loads closer together."""
    for reader in range(placement.config.group_size):
        chosen = {expert: source.owner for source in placement.sources(reader) for expert in source.experts}
        load = {owner: list(chosen.values()).count(owner) for owner in placement.owners}
        for expert, owner in chosen.items():
            assert all(load[owner] <= load[other] + 1 for other, _ in placement.locate(expert))


@given(placements(60))
def test_owners_take_turns_each_as_often_as_it_is_read_from(placement: ExpertPlacement) -> None:
    for reader in range(placement.config.group_size):
        order = placement.in_turn(reader)
        assert sorted(order) == list(range(placement.num_experts))
        of = dict.fromkeys(placement.experts(reader), reader)
        of |= {expert: source.owner for source in placement.sources(reader) for expert in source.experts}
        share = Counter(of.values())
        seen: Counter[object] = Counter()
        for count, expert in enumerate(order, 1):
            seen[of[expert]] += 1
            for owner, number in share.items():  # less than one from its part of what was read, of each other owner
                assert abs(seen[owner] - number * count / len(order)) < len(share)


@given(layouts())
def test_tiles_partition_the_range_and_each_owner_backs_its_bytes_rounded_outward(layout: RangeLayout) -> None:
    assert [page for tile in layout.tiles for page in tile.pages] == list(range(layout.num_pages))
    assert all(tile.owners for tile in layout.tiles)
    for owner in [*range(layout.placement.config.group_size), HOST]:
        backed = [page for tile in layout.tiles_of(owner) for page in tile.pages]
        held = {
            byte // layout.granularity
            for expert in layout.placement.experts(owner)
            for byte in range(expert * layout.expert_nbytes, (expert + 1) * layout.expert_nbytes)
        }
        assert backed == sorted(held) == list(layout.resident_pages(owner))


@given(layouts())
def test_two_owners_of_one_page_have_it_in_tiles_with_the_same_borders(layout: RangeLayout) -> None:
    """What lets any mixture of owners be mapped side by side: handles of different owners never overlap in part."""
    for tile in layout.tiles:
        for owner in tile.owners:
            assert tile in layout.tiles_of(owner)


@given(layouts())
def test_slots_and_the_resident_span_make_up_the_range(layout: RangeLayout) -> None:
    for rank in range(layout.placement.config.group_size):
        before, after = layout.staged_bytes(rank)
        resident = layout.resident_bytes(rank)
        assert [*before, *resident, *after] == list(range(layout.num_pages * layout.granularity))


@given(layouts(), st.one_of(st.none(), st.integers(1, 20).map(lambda n: 16 * n)))
def test_a_plan_copies_each_remote_byte_once_and_none_into_the_resident_span(
    layout: RangeLayout, slice_bytes: int | None
) -> None:
    for rank in range(layout.placement.config.group_size):
        plan = plan_layer({"w": layout}, rank, slice_bytes)
        fetched = list(itertools.chain.from_iterable(plan.streams))
        copied = sorted(itertools.chain.from_iterable(piece.bytes for piece in [*plan.edges, *fetched]))
        own = layout.shard_bytes(rank)
        assert copied == [byte for byte in range(layout.nbytes) if byte not in own]
        resident = layout.resident_bytes(rank)
        assert all(piece.bytes.start in resident and piece.bytes[-1] in resident for piece in plan.edges)
        assert not any(byte in resident for piece in fetched for byte in (piece.bytes.start, piece.bytes[-1]))
        for piece in [*plan.edges, *fetched]:
            held = layout.shard_bytes(piece.owner)
            assert piece.bytes.start in held
            assert piece.bytes[-1] in held
        assert plan.fetched_bytes == sum(len(piece.bytes) for piece in fetched)
        assert plan.num_copies == len(fetched)


@given(placements(40), st.integers(1, 100))
def test_slices_take_owners_in_turn_from_the_next_rank_on(placement: ExpertPlacement, expert_nbytes: int) -> None:
    layout = RangeLayout(placement, expert_nbytes, granularity=1)
    group_size = placement.config.group_size
    for rank in range(group_size):
        streams = plan_layer({"w": layout}, rank, 16).streams
        assert len(streams) <= 1
        remaining = [piece.owner for stream in streams for piece in stream for _ in range(0, len(piece.bytes), 16)]
        while remaining:
            turn = {owner: group_size if owner == HOST else (owner - rank - 1) % group_size for owner in remaining}
            assert remaining[: len(turn)] == sorted(turn, key=lambda owner: turn[owner])
            remaining = remaining[len(turn) :]


@given(placements(40), st.integers(1, 100))
def test_slices_of_one_owner_that_follow_one_another_are_one_copy(placement: ExpertPlacement, nbytes: int) -> None:
    layout = RangeLayout(placement, nbytes, granularity=1)
    for rank in range(placement.config.group_size):
        for stream in plan_layer({"w": layout}, rank, 16).streams:
            assert not any(a.owner == b.owner and a.bytes.stop == b.bytes.start for a, b in itertools.pairwise(stream))


@given(placements(40), st.integers(1, 100))
def test_streams_each_pull_whole_segments_from_owners_of_their_own(placement: ExpertPlacement, nbytes: int) -> None:
    layouts = {"first": RangeLayout(placement, nbytes, 1), "second": RangeLayout(placement, 2 * nbytes, 1)}
    group_size = placement.config.group_size
    for rank in range(group_size):
        streams = plan_layer(layouts, rank, None).streams
        sources = {source.owner for source in placement.sources(rank)}
        assert len(streams) == min(len(sources), MAX_STREAMS)
        owners = [{piece.owner for piece in stream} for stream in streams]
        assert set().union(*owners) == sources
        assert sum(map(len, owners)) == len(sources), "no owner is pulled from by two streams"
        for stream in streams:
            order = [list(layouts).index(piece.weight) for piece in stream]
            assert order == sorted(order), "what is read first is copied first"
        if len(sources) <= MAX_STREAMS:
            turns = [group_size if owner == HOST else (owner - rank - 1) % group_size for (owner,) in owners]
            assert turns == sorted(turns), "the next higher rank comes first"
        assert sum(map(len, streams)) == len(layouts) * len(placement.sources(rank))


@given(st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 8))
def test_blocks_fit_every_layer_and_are_no_more_than_the_largest_needs(layers: list[list[int]], large: int) -> None:
    blocks = divide(layers, large)
    assert sum(blocks.sizes) == max(sum(regions) for regions in layers)
    assert all(blocks.sizes), "no handle has zero bytes"
    for regions, assigned in zip(layers, blocks.regions, strict=True):
        assert [sum(blocks.sizes[block] for block in used) for used in assigned] == regions
        every = [block for used in assigned for block in used]
        assert len(every) == len(set(every))
