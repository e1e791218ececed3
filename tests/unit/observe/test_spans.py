"""Layers in a profile of torch's: one span for each acquire and release, and none where nobody profiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.groups import check_pass, join, random_model
from torch.profiler import ProfilerActivity, profile

from vmm_dwdp import DWDPConfig, DWDPRuntime

MODEL = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(5)})


def spans(profiled: profile) -> Counter[str]:
    return Counter(event.name for event in profiled.events() or () if event.name.startswith("vmm-dwdp"))


@pytest.mark.parametrize("config", [{}, {"mode": "in_place"}, {"mode": "in_place", "prefetch_depth": 0}], ids=str)
def test_a_span_for_each_layer(tmp_path: Path, config: dict[str, object]) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=4, **config), 0, tmp_path / "rendezvous", MODEL)  # type: ignore[arg-type]
    check_pass(runtime, MODEL)
    for passes in (2, 1):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(passes):
                check_pass(runtime, MODEL)
        assert spans(profiled) == {f"vmm-dwdp layer {number}": passes for number in MODEL}
        check_pass(runtime, MODEL)
    given_up(runtime)
    assert runtime.close().open() == []


def given_up(runtime: DWDPRuntime) -> None:
    """A pass that ends in its middle ends its spans, and what profiles from then on sees whole passes only."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in (0, 1):
            with runtime.layer(number):
                pass
        runtime.acquire(2)
        runtime.reset()
        check_pass(runtime, MODEL)
    expected = Counter(f"vmm-dwdp layer {number}" for number in [0, 1, 2, *MODEL])
    assert spans(profiled) == expected


def test_the_work_of_a_layer_is_in_its_span(tmp_path: Path) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=4), 0, tmp_path / "rendezvous", MODEL)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in MODEL:
            with runtime.layer(number) as weights:
                torch.relu(weights["w"])
    events = profiled.events() or ()
    kernels = sorted(event.time_range.start for event in events if event.name == "aten::relu")
    for number, at in enumerate(kernels):
        (span,) = (event.time_range for event in events if event.name == f"vmm-dwdp layer {number}")
        assert span.start <= at <= span.end
    assert len(kernels) == len(MODEL)
    del weights
    assert runtime.close().open() == []
