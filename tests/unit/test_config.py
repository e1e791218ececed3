"""Every bad value is refused with a sentence that names it; a good one survives YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vmm_dwdp import ConfigError, DWDPConfig, ExpertPlacement, WeightSpec


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"group_size": 0}, "group_size must be at least 1, not 0"),
        ({"group_size": -(1 << 20_000)}, "group_size must be at most 9223372036854775807"),
        ({"group_size": 2.0}, "group_size must be a whole number, not 2.0"),
        ({"group_size": True}, "group_size must be a whole number, not True"),
        ({"group_size": 2, "prefetch_depth": 0}, "prefetch_depth must be at least 1, not 0"),
        ({"group_size": 2, "num_local_experts": -1}, "num_local_experts must be at least 0, not -1"),
        ({"group_size": 2, "num_local_experts": "many"}, "num_local_experts must be a whole number, not 'many'"),
        ({"group_size": 2, "memory_bytes": 1 << 30}, "memory_bytes needs num_local_experts: auto"),
        ({"group_size": 2, "num_local_experts": "auto", "memory_bytes": 0}, "memory_bytes must be at least 1, not 0"),
        ({"group_size": 2, "num_local_experts": "auto", "memory_bytes": "8 Gb"}, "memory_bytes must be a whole number"),
        ({"group_size": 2, "host_experts": -3}, "host_experts must be at least 0, not -3"),
        ({"group_size": 2, "host_numa_node": -1}, "host_numa_node must be at least 0, not -1"),
        ({"group_size": 2, "slice_bytes": 100}, "slice_bytes must be a multiple of 16, not 100"),
        ({"group_size": 2, "slice_bytes": "often"}, "slice_bytes must be a whole number, not 'often'"),
        ({"group_size": 2, "assembly": "magic"}, "assembly must be one of vmm, tensor_list, not 'magic'"),
        ({"group_size": 2, "assembly": "tensor_list", "host_experts": 1}, "host_experts needs assembly: vmm"),
        ({"group_size": 2, "mode": "telepathy"}, "mode must be one of staged, in_place, auto, not 'telepathy'"),
        ({"group_size": 2, "mode": "in_place", "assembly": "tensor_list"}, "mode: in_place needs assembly: vmm"),
        ({"group_size": 2, "mode": "auto", "assembly": "tensor_list"}, "mode: auto needs assembly: vmm"),
        ({"group_size": 2, "mode": "auto", "prefetch_depth": 0}, "prefetch_depth must be at least 1, not 0"),
        ({"group_size": 2, "mode": "auto", "resident_cache": -1}, "resident_cache must be at least 0, not -1"),
        ({"group_size": 2, "mode": "auto", "resident_cache": "-4 GiB"}, "resident_cache must be a whole number, not"),
        ({"group_size": 2, "mode": "auto", "resident_cache": True}, "resident_cache must be a whole number, not True"),
        ({"group_size": 2, "resident_cache": 1 << 30}, "resident_cache needs mode: in_place or auto"),
        ({"group_size": 2, "checksums": "yes"}, "checksums must be true or false, not 'yes'"),
        ({"groupsize": 2}, "unknown key 'groupsize'"),
        ({}, "states no group_size"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DWDPConfig.from_dict(values)


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [("60 GB", 60_000_000_000), ("1.5GiB", 3 << 29), ("0.0035 MB", 3500), ("2 MiB", 1 << 21), (4096, 4096)],
)
def test_sizes_may_have_a_unit(written: object, nbytes: int) -> None:
    stated = {"group_size": 2, "num_local_experts": "auto", "mode": "auto"}
    sizes = {"memory_bytes": written, "resident_cache": written}
    assert DWDPConfig.from_dict(stated | sizes) == DWDPConfig.from_dict(stated | dict.fromkeys(sizes, nbytes))


@pytest.mark.parametrize("text", ["[1, 2]", "group_size: {", "just words", "", "group_size: !!bool x", "[" * 400])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dwdp.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"dwdp\.yaml"):
        DWDPConfig.from_yaml(path)


def test_aliases_are_refused(tmp_path: Path) -> None:
    """Nine times nine times nine ...: a few lines could stand for gigabytes."""
    path = tmp_path / "dwdp.yaml"
    path.write_text("prefetch_depth: &depth 2\ngroup_size: *depth\n")
    with pytest.raises(ConfigError, match="no use for aliases"):
        DWDPConfig.from_yaml(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        DWDPConfig.from_yaml(tmp_path / "absent.yaml")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=4, num_local_experts=9, prefetch_depth=3, slice_bytes=1 << 20, host_experts=2)
    config.to_yaml(tmp_path / "dwdp.yaml")
    assert DWDPConfig.from_yaml(tmp_path / "dwdp.yaml") == config
    auto = DWDPConfig(group_size=4, num_local_experts="auto", memory_bytes=1 << 36)
    auto.to_yaml(tmp_path / "dwdp.yaml")
    assert DWDPConfig.from_yaml(tmp_path / "dwdp.yaml") == auto


@pytest.mark.parametrize(
    ("num_experts", "values", "sentence"),
    [
        (16, {"group_size": 4, "num_local_experts": 3}, "num_local_experts must be at least 4"),
        (16, {"group_size": 4, "num_local_experts": 17}, "only 16 experts are on ranks"),
        (16, {"group_size": 4, "host_experts": 17}, "only 16 experts"),
    ],
)
def test_experts_that_cannot_be_spread(num_experts: int, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ExpertPlacement(num_experts, DWDPConfig(**values))


def test_owners_and_experts_that_are_not_there() -> None:
    placement = ExpertPlacement(16, DWDPConfig(group_size=2))
    with pytest.raises(ConfigError, match="there is no rank 2 in a group of 2"):
        placement.experts(2)
    with pytest.raises(ConfigError, match="there is no expert 16 in a layer of 16"):
        placement.locate(16)


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.dtype, not 'bf16'"):
        WeightSpec((4, 4), "bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0)])
def test_weights_without_bytes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="sizes of at least 1"):
        WeightSpec(shape, torch.bfloat16)


def test_the_example_of_the_documentation() -> None:
    assert ExpertPlacement(num_experts=256, config=DWDPConfig(group_size=4)).locate(200) == [(3, 8)]
