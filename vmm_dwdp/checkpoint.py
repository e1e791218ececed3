"""From safetensors files to this process's shards: only what it owns is read, one expert at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from vmm_dwdp.allocator.handles import Owned
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.runtime import DWDPRuntime

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_COUNTED: Final = (".safetensors", ".safetensors.index.json")
_LONGEST_HEADER: Final = 100_000_000  # bytes: safetensors reads no longer one
_BLOCKS: Final = 32  # of each file, for `revision_of`
_BLOCK: Final = 4096  # bytes


class Checkpoint(Owned):
    """The safetensors files of one model directory, in the ordinary Hugging Face layout.

    Args:
        files: instead of what the layout says, these files of the directory, each with whatever is in it; of tensors
            with one name the last counts.

    Opening reads headers only; `read` reads the bytes that were asked for and keeps none. The files stay open (and
    mapped) until `close`, or the end of a ``with`` block.

    Raises:
        ConfigError: the directory has no safetensors files, or one that the index names is missing or unreadable, or
            lacks a tensor that the index says it has.
    """

    def __init__(self, directory: Path, files: Iterable[Path] | None = None) -> None:
        self.directory = directory
        self._slices: dict[str, Any] = {}  # by the tensor's name: safetensors' own lazy slice of it
        self._files = ExitStack()
        try:
            found = self._files_and_names() if files is None else dict.fromkeys(files)
            for file, names in found.items():
                self._open(file, names)
        except BaseException:
            self.close()
            raise

    def _files_and_names(self) -> dict[Path, Iterable[str] | None]:
        """Every file, with the names the index promises in it; without an index, one file with whatever is in it."""
        if not self.directory.is_dir():
            raise ConfigError(f"there is no directory {self.directory}")
        index = self.directory / INDEX_FILE
        if (self.directory / SINGLE_FILE).is_file():
            return {self.directory / SINGLE_FILE: None}
        if not index.is_file():
            raise ConfigError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in weight_map.items():
                if os.path.basename(file) != file:
                    raise ValueError(f"{file!r} is not the name of a file beside it")
                files.setdefault(self.directory / file, []).append(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(f"{index} is not an index of safetensors files: {error!r}") from error
        return dict(files)

    def _open(self, file: Path, names: Iterable[str] | None) -> None:
        if not os.path.isfile(file):  # false for a name that cannot be, too
            raise ConfigError(f"{INDEX_FILE} names {file.name}, but {self.directory} has no such file")
        try:
            opened = self._files.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error
        present = set(opened.keys())
        for name in present if names is None else names:
            if name not in present:
                raise ConfigError(f"{INDEX_FILE} says that {file.name} holds {name}, but it does not")
            self._slices[name] = opened.get_slice(name)

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._slices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors writes it: ``"BF16"``, ``"F8_E4M3"``."""
        dtype: str = self._slices[name].get_dtype()
        return dtype

    def empty(self, name: str, row: int | None = None) -> torch.Tensor:
        """What `read` gives, on the meta device: its shape and dtype, without reading it."""
        shape = self.shape(name)
        dtype = self._slices[name][:0].dtype if shape else self.read(name).dtype
        return torch.empty(shape if row is None else (1, *shape[1:]), dtype=dtype, device="meta")

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor's bytes in a new tensor on the CPU; with ``row``, only that row: ``[1, ...]`` of ``[E, ...]``.

        Raises `ConfigError` if there is no such row, or the tensor cannot be read.
        """
        whole, shape = self._slices[name], self.shape(name)
        if row is not None and row not in range(shape[0] if shape else 0):
            raise ConfigError(f"{name} in {self.directory} has the shape {list(shape)} and no row {row}")
        try:
            with torch.inference_mode(False):
                tensor: torch.Tensor = whole[...] if row is None else whole[row : row + 1]
        except (RuntimeError, IndexError, SafetensorError) as error:
            raise ConfigError(f"{name} in {self.directory} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._slices.clear()
        self._files.close()


def revision_of(folder: Path, files: Iterable[Path] | None = None) -> str:
    """A digest by which ranks tell whether they were given the same checkpoint, without reading it.

    It is made of each file's name and size, of its header (names, shapes and dtypes of all tensors), and of 32 blocks
    of 4 KiB spread evenly over it, the last one included: some 10 MiB of a checkpoint of 700 GB. So it tells apart
    other weights of the same model, another quantisation, files that are missing, and downloads that are not complete.
    It does not notice what changes a few tensors of a large file and leaves the rest, its header and its size alone.

    Args:
        folder: with safetensors files; other files do not count, except for the index.
        files: those that are read, if they are not all.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        found = sorted(files or [file for file in folder.iterdir() if file.name.endswith(_COUNTED)])
        for file in found:
            with file.open("rb", buffering=0) as opened:
                _sample_file(opened.fileno(), file.name, digest.update)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"{folder} has no safetensors files")
    return digest.hexdigest()


def _sample_file(descriptor: int, name: str, update: Callable[[bytes], None]) -> None:
    size = os.fstat(descriptor).st_size
    update(f"{name} {size} ".encode())
    header = int.from_bytes(os.pread(descriptor, 8, 0), "little")  # bytes of it, which follow; see safetensors' format
    if size <= _BLOCKS * _BLOCK or name.endswith(".json"):
        update(os.pread(descriptor, size, 0))
        return
    update(os.pread(descriptor, min(header, size - 8, _LONGEST_HEADER), 8))
    for block in range(_BLOCKS):
        update(os.pread(descriptor, _BLOCK, (size - _BLOCK) * block // (_BLOCKS - 1)))


def fill_shards(runtime: DWDPRuntime, layer: int, weight: str, read: Callable[[int], torch.Tensor]) -> None:
    """Fill the shards of one weight that this process holds, one expert at a time.

    Args:
        read: gives the part of an expert, without the dimension of the experts, on any device.

    Raises what ``read`` and `DWDPRuntime.local_shard` raise.
    """
    for owner in runtime.held_owners:
        shard = runtime.local_shard(layer, weight, owner)
        for row, expert in zip(shard, runtime.local_experts(layer, owner), strict=True):
            row.copy_(read(expert))
