"""Safetensors files by their headers, and shards filled one expert at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.groups import PAGE

from vmm_dwdp import HOST, ConfigError, DWDPConfig, DWDPRuntime, WeightSpec
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, fill_shards, revision_of

TENSORS = {"a": torch.arange(24.0).view(4, 3, 2), "b": torch.arange(6, dtype=torch.int16).view(2, 3)}


def write_two_files(directory: Path) -> None:
    """``a`` in one file, ``b`` in the other, and the index of both."""
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, directory / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in TENSORS}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def write_one_file(directory: Path) -> None:
    save_file(TENSORS, directory / SINGLE_FILE)


@pytest.mark.parametrize("write", [write_one_file, write_two_files])
def test_reads_tensors_and_rows(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names) == {"a", "b"}
        assert checkpoint.shape("a") == (4, 3, 2)
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
        assert torch.equal(checkpoint.read("a", 2), TENSORS["a"][2:3])
        assert checkpoint.read("b", 1).dtype == torch.int16


def test_a_tensor_without_dimensions_and_rows_that_are_not_there(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(2.5), "b": TENSORS["b"]}, tmp_path / SINGLE_FILE)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("scale"), torch.tensor(2.5))
        for name, row in ("scale", 0), ("b", 2), ("b", -1):
            with pytest.raises(ConfigError, match=f"{name} in .* no row {row}"):
                checkpoint.read(name, row)


def cut(directory: Path) -> None:
    file = directory / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def index_of(weight_map: object) -> Callable[[Path], None]:
    return lambda directory: (directory / INDEX_FILE).write_text(json.dumps(weight_map)) and None


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda directory: (directory / INDEX_FILE).unlink(), "neither"),
        (lambda directory: (directory / INDEX_FILE).write_text("{"), INDEX_FILE),
        (index_of({"weights": {}}), "weight_map"),
        (index_of({"weight_map": {"a": "../a.safetensors"}}), "not the name of a file beside it"),
        (index_of({"weight_map": {"a": "a" * 300}}), "has no such file"),
        (index_of({"weight_map": {"a": "a.safetensors", "c": "b.safetensors"}}), "b.safetensors holds c"),
        (lambda directory: (directory / "a.safetensors").unlink(), "a.safetensors"),
        (cut, "b.safetensors"),
    ],
)
@pytest.mark.usefixtures("open_descriptors")
def test_what_is_missing_or_spoilt_is_named(tmp_path: Path, spoil: Callable[[Path], None], named: str) -> None:
    write_two_files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=named):
        Checkpoint(tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")


def test_files_that_are_given_count_instead_of_the_layout(tmp_path: Path) -> None:
    """And of a tensor in two of them, the later one, as for transformers."""
    write_two_files(tmp_path)
    save_file({"a": TENSORS["a"] + 1, "c": TENSORS["b"]}, tmp_path / "other.safetensors")
    with Checkpoint(tmp_path, [tmp_path / "a.safetensors", tmp_path / "other.safetensors"]) as checkpoint:
        assert set(checkpoint.names) == {"a", "c"}
        assert torch.equal(checkpoint.read("a"), TENSORS["a"] + 1)
        assert (checkpoint.dtype("a"), checkpoint.dtype("c")) == ("F32", "I16")


LARGE = {"w": torch.arange(300_000, dtype=torch.int32), "v": torch.arange(100_000, dtype=torch.int32)}  # 1.6 MB


def write_large(directory: Path, **changed: torch.Tensor) -> Path:
    directory.mkdir()
    save_file({**LARGE, **changed}, directory / SINGLE_FILE)
    (directory / INDEX_FILE).write_text("{}")
    (directory / "README.md").write_text(str(directory))  # does not count
    return directory


def with_last_byte(directory: Path) -> None:
    with (directory / SINGLE_FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: save_file({"w": LARGE["w"] + 1, "v": LARGE["v"]}, directory / SINGLE_FILE),
        lambda directory: save_file({"u": LARGE["w"], "v": LARGE["v"]}, directory / SINGLE_FILE),
        lambda directory: save_file({"w": LARGE["w"].float(), "v": LARGE["v"]}, directory / SINGLE_FILE),
        lambda directory: save_file({"w": LARGE["w"][:-1], "v": LARGE["v"]}, directory / SINGLE_FILE),
        lambda directory: save_file(TENSORS, directory / "more.safetensors"),
        lambda directory: (directory / SINGLE_FILE).rename(directory / "other.safetensors"),
        lambda directory: (directory / INDEX_FILE).write_text('{"a": 1}'),
        with_last_byte,
    ],
)
def test_another_revision_has_another_digest(tmp_path: Path, change: Callable[[Path], object]) -> None:
    first, second = write_large(tmp_path / "first"), write_large(tmp_path / "second")
    assert revision_of(first) == revision_of(second)
    change(second)
    assert revision_of(first) != revision_of(second)


def test_a_digest_of_some_of_the_files(tmp_path: Path) -> None:
    directory = write_large(tmp_path / "x")
    before = revision_of(directory, [directory / SINGLE_FILE])
    save_file(TENSORS, directory / "more.safetensors")
    assert revision_of(directory, [directory / SINGLE_FILE]) == before != revision_of(directory)


def test_a_digest_reads_little_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def recording(*arguments: int) -> bytes:
        read.append(len(pread(*arguments)))
        return pread(*arguments)

    directory = write_large(tmp_path / "x", w=torch.zeros(10_000_000, dtype=torch.uint8))
    monkeypatch.setattr(os, "pread", recording)
    revision_of(directory)
    assert 100_000 < sum(read) < 200_000


@pytest.mark.parametrize("spoil", [lambda directory: None, lambda directory: directory.rmdir()])
def test_a_digest_of_nothing_is_refused(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    (tmp_path / "x").mkdir()
    spoil(tmp_path / "x")
    with pytest.raises(ConfigError, match="x"):
        revision_of(tmp_path / "x")


def test_shards_are_filled_expert_by_expert(tmp_path: Path) -> None:
    """On the rank that makes the host pool, the pool's too; each expert is asked for once."""
    config = DWDPConfig(group_size=2, host_experts=2, num_local_experts=5)
    weight = torch.randn(10, 3, 5, dtype=torch.float64)
    asked: list[int] = []

    def read(expert: int) -> torch.Tensor:
        asked.append(expert)
        return weight[expert]

    for rank, held in enumerate([[0, 1, 2, 3, 4, 8, 9], [3, 4, 5, 6, 7]]):
        with DWDPRuntime(config, rank, "cpu", tmp_path / "rendezvous", driver=HostDriver(PAGE)) as runtime:
            runtime.add_layer(0, {"w": WeightSpec((10, 3, 5), torch.bfloat16)})
            asked.clear()
            fill_shards(runtime, 0, "w", read)
            assert asked == held
            own = runtime.local_experts(0)
            assert torch.equal(runtime.local_shard(0, "w"), weight[own.start : own.stop].bfloat16())
            if rank == 0:
                assert torch.equal(runtime.local_shard(0, "w", HOST), weight[8:].bfloat16())
