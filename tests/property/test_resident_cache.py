"""Every byte of every pass, staged and in place, after any sequence of refreshes of a resident cache."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.groups import PAGE, Model, Shapes, check_pass, published, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.config import Mode
from vmm_dwdp.memory.cache import KEEP, Candidate, hottest


@st.composite
def groups(draw: st.DrawFn) -> tuple[DWDPConfig, Shapes]:
    num_experts = draw(st.integers(1, 24))
    group_size = draw(st.integers(1, 3))
    host_experts = draw(st.integers(0 if group_size > 1 else 1, num_experts))
    on_ranks = num_experts - host_experts
    config = DWDPConfig(
        group_size=group_size,
        num_local_experts=draw(st.one_of(st.none(), st.integers(-(-on_ranks // group_size), on_ranks))),
        host_experts=host_experts,
        prefetch_depth=draw(st.integers(0, 3)),
        mode="in_place",
        resident_cache=draw(st.integers(PAGE, 40 * PAGE)),
        checksums=True,
    )
    # Experts of a few bytes, of a page exactly, and of several pages and a part of one.
    size = st.one_of(st.integers(1, 300), st.just(PAGE // 4), st.integers(1, 5000))
    sizes = draw(st.lists(size, min_size=1, max_size=2))
    layers: Shapes = {
        layer: {f"weight{i}": ((num_experts, size + 33 * layer), torch.float32) for i, size in enumerate(sizes)}
        for layer in range(draw(st.integers(1, 3)))
    }
    return config, layers


def route(runtime: DWDPRuntime, model: Model, generator: torch.Generator) -> dict[int, list[int]]:
    """Tokens that choose experts with random favourites, and for each layer how many tokens chose each expert."""
    counts = {}
    for number, weights in model.items():
        num_experts = len(next(iter(weights.values())))
        favour = torch.rand(num_experts, generator=generator) ** 6 + 1e-9
        chosen = torch.multinomial(favour.expand(5, -1), min(2, num_experts), generator=generator)
        runtime.acquire(number, chosen=chosen)
        runtime.release(number)
        counts[number] = torch.bincount(chosen.flatten(), minlength=num_experts).tolist()
    return counts


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups(), st.lists(st.sampled_from(["staged", "in_place", "refresh"]), max_size=12), st.integers(0, 2**32 - 1))
def test_every_byte_at_the_same_address_after_any_sequence_of_refreshes(
    group: tuple[DWDPConfig, Shapes], steps: list[str], seed: int
) -> None:
    config, layers = group
    model = random_model(layers, seed)
    generator = torch.Generator().manual_seed(seed)
    modes: list[Mode] = ["staged"] * bool(config.prefetch_depth) + ["in_place"]
    with tempfile.TemporaryDirectory() as rendezvous, published(config, rendezvous, model) as runtimes:
        for runtime in runtimes:
            addresses = addresses_of(runtime, model)
            for step in [*steps, "refresh", *modes]:
                if step == "refresh":
                    route(runtime, model, generator)
                    runtime.refresh_cache()
                    runtime.check_integrity(verify=True)
                elif step in modes:
                    check_pass(runtime, model, mode=step)  # type: ignore[arg-type]
            assert addresses_of(runtime, model) == addresses
            assert runtime.ledger.counts()["mappings"] <= runtime._assembly.num_mappings()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups(), st.integers(0, 2**32 - 1))
def test_what_is_said_to_be_served_is_what_the_kernel_maps_elsewhere(
    group: tuple[DWDPConfig, Shapes], seed: int
) -> None:
    config, layers = group
    model = random_model(layers, seed)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as rendezvous, published(config, rendezvous, model) as runtimes:
        runtime = runtimes[0]
        owned = files_of(runtime, model)
        route(runtime, model, generator)
        runtime.refresh_cache()
        mapped = files_of(runtime, model)
        tokens = route(runtime, model, generator)
        runtime.refresh_cache()
        read = served = changed = 0
        for (number, name, page), file in mapped.items():
            changed += file != owned[number, name, page]
            experts = experts_in_page(model[number][name], page)
            if not experts.keys() & set(runtime.local_experts(number)):
                nbytes = sum(tokens[number][expert] * nbytes for expert, nbytes in experts.items())
                read += nbytes
                served += nbytes * (file != owned[number, name, page])
        cache = runtime.stats().cache
        if cache is None:
            assert (read, changed) == (0, 0)
        else:
            assert cache.served == (served / read if read else None)
            assert changed * PAGE <= cache.nbytes <= config.resident_cache


def addresses_of(runtime: DWDPRuntime, model: Model) -> dict[tuple[int, str], int]:
    """Where the tensors are that are read in place."""
    found = {}
    for number in model:
        with runtime.layer(number) as weights:
            for name, weight in weights.items():
                assert isinstance(weight, torch.Tensor)
                found[number, name] = weight.data_ptr()
        del weights, weight
    return found


def files_of(runtime: DWDPRuntime, model: Model) -> dict[tuple[int, str, int], str]:
    """Which file the kernel has mapped, by layer, weight and page of the weight."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, inode, *_ = line.split()
        first, stop = (int(end, 16) for end in span.split("-"))
        ranges.append((first, stop, inode))
    found = {}
    for (number, name), address in addresses_of(runtime, model).items():
        for page in range(-(-model[number][name].nbytes // PAGE)):
            (found[number, name, page],) = (
                inode for first, stop, inode in ranges if first <= address + page * PAGE < stop
            )
    return found


def experts_in_page(weight: torch.Tensor, page: int) -> dict[int, int]:
    """The experts of a weight ``[E, ...]`` with bytes in the page, each with how many."""
    of_byte = torch.arange(len(weight)).repeat_interleave(weight[0].nbytes)[page * PAGE : (page + 1) * PAGE]
    experts, counts = of_byte.unique(return_counts=True)
    return dict(zip(experts.tolist(), counts.tolist(), strict=True))


def brute_force(candidates: Sequence[Candidate], num_pages: int) -> float:
    """The most heat that any choice of at most ``num_pages`` pages has."""
    best = [0.0] * (num_pages + 1)
    for heat, pages, _ in candidates:
        for room in range(num_pages, pages - 1, -1):
            best[room] = max(best[room], best[room - pages] + heat)
    return best[num_pages]


CANDIDATES = st.lists(st.builds(Candidate, st.integers(0, 100), st.integers(1, 5), st.booleans()), max_size=12)


@given(CANDIDATES, st.integers(0, 20))
def test_the_hottest_tiles_fit_and_little_is_lost(candidates: list[Candidate], num_pages: int) -> None:
    chosen = hottest(candidates, num_pages)
    assert sum(candidates[place].num_pages for place in chosen) <= num_pages
    assert all(candidates[place].heat or candidates[place].cached for place in chosen)
    kept = sum(candidates[place].heat for place in chosen)
    most_left_out = max((candidate.heat for candidate in candidates), default=0)
    # By the page in order of heat, a choice is at most one tile short of the best; what is cached counts KEEP-fold.
    assert kept * KEEP + most_left_out >= brute_force(candidates, num_pages)
