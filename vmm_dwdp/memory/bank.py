"""A bank of experts before each in-place range: rows of this device's own memory, planned on the device itself.

[Note: The bank]
Per layer and weight, in one range of addresses, mapped once:

    bank and in place    |== row 0 ==| ... |== row S - 1 ==|  expert 0  |  expert 1  |  expert 2  |   ...
    backed by            |------ this device's memory -----|==== rank 0 ====|== own pages ==|== host memory ==|

It is one tensor ``[S + E, ...]``, and what a kernel is told is which rows to read: an expert's row in the bank, or ``S
+ e``. All weights of a layer share a table, which says who is in which row, and is the device's own: the host keeps no
copy, so what was captured and never replayed has changed nothing. How it is planned: [Note: The planner] in
`kernels/bank_table.py`.

Whoever is about to change the bytes of experts, or to give memory back, makes the table empty first; then all is read
in place, and what is used comes into the bank anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from vmm_dwdp.allocator.driver import Access, Driver
from vmm_dwdp.allocator.handles import Allocation, Ledger, Reservation, ResourceStack
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.errors import ConfigError, DriverError, StateError
from vmm_dwdp.kernels.bank import look_up
from vmm_dwdp.kernels.bank_table import BankTable
from vmm_dwdp.kernels.provider import not_installed
from vmm_dwdp.layout.bank import BankLayout, bank_nbytes, bank_rows
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.memory.tensor_memory import TensorMemory
from vmm_dwdp.observe.stats import BankCounts, BankStats

# Tokens of a pass up to which experts come into the bank; larger ones read what is not there in place.
MOST_COPIED: Final = 32


class Bank:
    """The banks of all layers; see [Note: The bank]. The constructor takes no memory for rows.

    Args:
        layers: in the order of a pass.
        nbytes: of memory that the rows may take.
        resources: what it takes is pushed there.

    Raises `ConfigError` if there is not room for one row of each layer, or on a GPU no Triton.
    """

    def __init__(
        self, driver: Driver, ledger: Ledger, layers: Sequence[Layer], nbytes: int, resources: ResourceStack
    ) -> None:
        self._driver = driver
        self._ledger = ledger
        self._resources = resources
        self._stated = nbytes
        if driver.device.type == "cuda" and (missing := not_installed("triton", "triton")) is not None:
            raise ConfigError(f"expert_bank cannot be planned on this GPU, as it {missing}")
        rows = bank_rows(layers, nbytes)
        if not any(rows.values()):
            raise ConfigError(
                f"expert_bank is {nbytes} bytes, and one expert of each layer takes {bank_nbytes(layers, 1)}, in whole "
                "pages"
            )
        self._layers = {layer.number: layer for layer in layers if rows[layer.number]}
        self._layouts = {
            (number, weight): BankLayout(rows[number], layout)
            for number, layer in self._layers.items()
            for weight, layout in layer.layouts.items()
        }
        self._tables = {
            number: BankTable.empty(
                layer.placement.num_experts, rows[number], layer.placement.experts(layer.rank), driver.device
            )
            for number, layer in self._layers.items()
        }
        self._pages: dict[tuple[int, str], Allocation] = {}
        self._weights: dict[int, dict[str, Tensor]] = {}

    # -- pages ---------------------------------------------------------------------------------------------------------
    def take(self) -> None:
        """Take the pages, unless they are there. Raises `ConfigError` if there is not so much memory."""
        for (number, weight), layout in self._layouts.items():
            if (number, weight) in self._pages:
                continue
            label = f"layer {number}, {weight}, bank"
            try:
                with uninterrupted():
                    pages = Allocation.create(self._driver, self._ledger, layout.nbytes, label=label)
                    self._pages[number, weight] = self._resources.push(pages)
            except DriverError as error:
                taken = sum(pages.nbytes for pages in self._pages.values())
                raise ConfigError(
                    f"an expert_bank of {self._stated} bytes does not fit beside what is in memory already: after "
                    f"{taken} of them, {error}"
                ) from error

    def give_back(self) -> None:
        """Release the pages, of which none is mapped any more, and of which the table says nothing."""
        for key in list(self._pages):
            self._resources.close_one(self._pages[key])
            del self._pages[key]

    def nbytes_before(self, number: int, weight: str) -> int:
        """Where in its range the first expert in place is."""
        layout = self._layouts.get((number, weight))
        return 0 if layout is None else layout.nbytes

    def map(self, number: int, weight: str, memory: Reservation) -> None:
        """Put the rows' pages at the start of the range, of which nothing is mapped there."""
        if (pages := self._pages.get((number, weight))) is not None:
            memory.map(0, pages)
            memory.set_access(0, pages.nbytes, Access.READ_WRITE)

    def show(self, number: int, weight: str, memory: TensorMemory[Reservation]) -> None:
        """Make the tensor ``[S + E, ...]`` over the range."""
        if (layout := self._layouts.get((number, weight))) is not None:
            spec = self._layers[number].weights[weight]
            tensor = memory.tensor(layout.first, spec.of(layout.num_rows + spec.num_experts), spec.dtype)
            self._weights.setdefault(number, {})[weight] = tensor

    def close(self) -> None:
        """Let go of the tensors."""
        self._weights.clear()

    @property
    def num_handles(self) -> int:
        """One for each weight of a layer that has rows, and as many mappings."""
        return len(self._layouts)

    # -- passes --------------------------------------------------------------------------------------------------------
    def warm_up(self) -> None:
        """Launch every form of the kernels of every layer on the current stream, for no expert: a capture, in which
        nothing can be compiled nor loaded, may have the first pass. Waits for the device: passes may be on any
        stream."""
        for number, table in self._tables.items():
            for dtype, copies in itertools.product((torch.int32, torch.int64), (False, True)):
                nobody = torch.full((1, 1), -1, dtype=dtype, device=self._driver.device)
                look_up(table, nobody, list(self._weights[number].values()), copies=copies)
        self._driver.synchronize()

    def look_up(self, number: int, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        """Work for the current stream: the tensors ``[S + E, ...]`` of a layer, and where in them each of the
        ``chosen`` experts ``[tokens, top_k]`` is read. ``None`` if the layer has no rows, as nothing of it is remote.

        Raises `ConfigError` if a token chooses more experts than there are rows, and others would be there to hold.
        """
        table = self._tables.get(number)
        if table is None:
            return None
        tokens, top_k = chosen.shape
        if table.num_rows < min(top_k, self._layers[number].num_remote):
            raise ConfigError(
                f"the bank of layer {number} has {table.num_rows} rows, and a token uses {top_k} experts: an "
                f"expert_bank of {bank_nbytes(list(self._layers.values()), top_k)} bytes has as many"
            )
        weights = self._weights.get(number)
        if weights is None:
            raise StateError("the runtime is closed")  # by another thread, or below a signal's handler
        rows = look_up(table, chosen, list(weights.values()), copies=tokens <= MOST_COPIED)
        return weights, rows

    # -- between passes ------------------------------------------------------------------------------------------------
    def empty(self) -> None:
        """Nothing is in the bank any more. The device is idle before, and after."""
        for table in self._tables.values():
            table.rows.fill_(-1)
        self._driver.synchronize()

    def verify(self) -> None:
        """Raise `StateError` unless tables are such as are planned, and rows have their experts' bytes. Waits for the
        device."""
        for number, table in self._tables.items():
            rows = {expert: row for expert, row in enumerate(table.rows.tolist()) if row != -1}
            distinct = set(rows.values())
            if len(distinct) < len(rows) or not distinct <= set(range(table.num_rows)) or rows.keys() & set(table.own):
                raise StateError(f"the table of the bank of layer {number} is not one that was planned: {rows}")
            for name, weight in self._weights[number].items():
                as_bytes = weight.reshape(len(weight), -1).view(torch.uint8)
                for expert, row in rows.items():
                    if not torch.equal(as_bytes[row], as_bytes[table.num_rows + expert]):
                        raise StateError(
                            f"the bank of layer {number}, {name}, has other bytes of expert {expert} than its owner"
                        )

    def stats(self) -> BankStats:
        """Without what the device has counted."""
        return BankStats(
            nbytes=sum(pages.nbytes for pages in self._pages.values()),
            rows={number: table.num_rows for number, table in self._tables.items()},
        )

    def counts(self) -> dict[int, BankCounts]:
        """By layer number. Waits for the current stream."""
        return {number: BankCounts(*table.counts.tolist()) for number, table in self._tables.items()}
