"""Every byte that passes look up in a bank, after any sequence of passes, updates and sleep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.banks import look_up_and_check, models_of, some_experts
from support.groups import PAGE, Model, Shapes, check_pass, in_threads, published, random_model

from vmm_dwdp import DWDPConfig, DWDPRuntime
from vmm_dwdp.layout.bank import bank_nbytes
from vmm_dwdp.layout.layer import describe_layer
from vmm_dwdp.layout.weight_spec import WeightSpec

TOP_K = 2


@st.composite
def groups(draw: st.DrawFn) -> tuple[DWDPConfig, Shapes]:
    num_experts = draw(st.integers(2, 24))
    group_size = draw(st.integers(1, 3))
    host_experts = draw(st.integers(0 if group_size > 1 else 1, num_experts))
    on_ranks = num_experts - host_experts
    # Experts of a few bytes, of a page exactly, and of several pages and a part of one.
    size = st.one_of(st.integers(1, 300), st.just(PAGE // 4), st.integers(1, 5000))
    sizes = draw(st.lists(size, min_size=1, max_size=2))
    layers: Shapes = {
        layer: {f"weight{i}": ((num_experts, size + 33 * layer), torch.float32) for i, size in enumerate(sizes)}
        for layer in range(draw(st.integers(1, 3)))
    }
    config = DWDPConfig(
        group_size=group_size,
        num_local_experts=draw(st.one_of(st.none(), st.integers(-(-on_ranks // group_size), on_ranks))),
        host_experts=host_experts,
        prefetch_depth=draw(st.integers(0, 2)),
        mode="in_place",
        expert_bank=1 << 40,
        checksums=True,
    )
    rows = draw(st.integers(TOP_K, num_experts))
    described = [
        describe_layer(
            number,
            {name: WeightSpec(*stated) for name, stated in weights.items()},
            config,
            0,
            PAGE,
        )
        for number, weights in layers.items()
    ]
    least = max(bank_nbytes(described, rows), len(layers) * len(sizes) * PAGE)
    return DWDPConfig(**{**vars(config), "expert_bank": least + draw(st.integers(0, 3)) * PAGE}), layers


STEPS = st.lists(st.sampled_from(["few", "few", "few", "many", "staged", "update", "sleep"]), max_size=10)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups(), STEPS, st.integers(0, 2**32 - 1))
def test_every_byte_that_is_looked_up_after_any_steps(
    group: tuple[DWDPConfig, Shapes], steps: list[str], seed: int
) -> None:
    config, layers = group
    models = [random_model(layers, seed + age) for age in (0, 1)]
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as rendezvous, published(config, rendezvous, models[0]) as runtimes:
        banks = [models_of(runtime, models[0]) for runtime in runtimes]
        for step in ["few", *steps, "few", "few"]:
            if step == "update":
                models.reverse()
                together(runtimes, lambda runtime: write(runtime, models[0]))
            elif step == "sleep":
                together(runtimes, lambda runtime: runtime.sleep(timeout=20))
                together(runtimes, lambda runtime: runtime.wake(timeout=20))
            elif step == "staged" and config.prefetch_depth:
                check_pass(runtimes[0], models[0], mode="staged")
            for runtime, bank in zip(runtimes, banks, strict=True):
                if step in ("update", "sleep"):
                    for layer in bank.values():
                        layer.row_of.clear()  # how often experts were used is still known
                elif step in ("few", "many"):
                    tokens = 3 if step == "few" else 40
                    for number, weights in models[0].items():
                        num_experts = len(next(iter(weights.values())))
                        chosen = some_experts(num_experts, tokens, TOP_K, generator)
                        look_up_and_check(runtime, models[0], number, chosen, bank)
                runtime.check_integrity(verify=True)
        for runtime, bank in zip(runtimes, banks, strict=True):
            assert {number: list(counts) for number, counts in runtime.bank_counts().items()} == {
                number: layer.counts for number, layer in bank.items()
            }
            held = runtime.stats().bank
            assert held is None or 0 < held.nbytes <= config.expert_bank


def together(runtimes: list[DWDPRuntime], call: Callable[[DWDPRuntime], None]) -> None:
    in_threads(lambda rank: call(runtimes[rank]), len(runtimes))


def write(runtime: DWDPRuntime, model: Model) -> None:
    shards = {
        (number, name, owner): tensor[experts.start : experts.stop]
        for number, weights in model.items()
        for name, tensor in weights.items()
        for owner in runtime.held_owners
        for experts in [runtime.local_experts(number, owner)]
    }
    runtime.update(shards, timeout=20)
