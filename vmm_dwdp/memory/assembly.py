"""What turns shards and staging memory into the weights that a layer's forward pass reads.

Two ways to do it: :class:`~vmm_dwdp.memory.virtual.VirtualAssembly` gives one tensor per weight,
:class:`~vmm_dwdp.memory.tensor_list.TensorListAssembly` a list of them. The runtime drives both by the same calls, in
this order: `shard`, filled by the caller; `shares`, given to others; `attach`, for every other owner; `build`;
then `copies` and `weights` for as long as it lives; `close`.
"""

from __future__ import annotations

import abc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal

import torch

from vmm_dwdp.allocator.driver import Address, Copy, Driver
from vmm_dwdp.allocator.handles import Descriptor, Ledger, ResourceStack
from vmm_dwdp.allocator.tensors import tensor_at
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import Mode
from vmm_dwdp.errors import ExchangeError, StateError
from vmm_dwdp.layout.copies import Segment
from vmm_dwdp.layout.layer import Layer
from vmm_dwdp.layout.placement import Owner, in_words
from vmm_dwdp.memory.bank import Bank
from vmm_dwdp.memory.cache import ResidentCache
from vmm_dwdp.memory.expert_tables import ExpertTables
from vmm_dwdp.memory.tensor_memory import TensorMemory

_COMPARED_NBYTES: Final = 64 << 20  # at one time, because comparing takes memory, too

Weights = dict[str, torch.Tensor] | dict[str, list[torch.Tensor]]
Share = Descriptor | bytes  # physical memory on its way to another process
# Where a shard is: where its owner holds it, or saved in host memory while its owner sleeps, or given up by `sleep`
Place = Literal["device", "host", "nowhere"]


def close_shares(shares: Iterable[Share]) -> None:
    """Close what is a descriptor among them."""
    for share in shares:
        if isinstance(share, Descriptor):
            share.close()


class Assembly(abc.ABC):
    """The memory of one rank: its own shards, its views of the others', and its slots.

    Attributes:
        rank: whose memory it is.
        resident_nbytes: physical bytes of the rank's own shards, whole pages, and of the pool of host memory if it
            holds that.
        pool_nbytes: of these, the bytes of the pool.
        staged_nbytes: physical bytes of the slots.
        tables: in which row each expert is.
        cache: of remote experts, once it is built; ``None`` where the config has none or nothing is remote.
        bank: likewise.
    """

    def __init__(self, driver: Driver, ledger: Ledger, rank: int, layers: Sequence[Layer], prefetch_depth: int) -> None:
        """``layers``, in the order of a pass, may become more until memory is taken."""
        self.resident_nbytes = 0
        self.pool_nbytes = 0
        self.staged_nbytes = 0
        self.tables = ExpertTables(driver, layers)
        self.cache: ResidentCache | None = None
        self.bank: Bank | None = None
        self._driver = driver
        self._ledger = ledger
        self.rank = rank
        self._depth = prefetch_depth
        self._layers = layers
        self._ranges: list[TensorMemory[Any]] = []
        self._resources = ResourceStack()
        self._touches = threading.RLock()  # of who touches this memory, and guards what follows
        self._stopped = False
        self._handing_over = threading.Lock()  # guards what follows, which threads read that answer others
        self._received: dict[tuple[Owner, Place], list[Share]] = {}
        self._there: set[tuple[Owner, Place]] = set()  # whose memory is here whole

    @contextmanager
    def touching(self) -> Iterator[None]:
        """A thread that is in no pass reads or writes this memory, one at a time, with the device current. `stop` waits
        for it, and the handler of a signal, which may close, comes after it. Raises `StateError` after `stop`."""
        with uninterrupted(), self._touches, self._driver.current():
            if self._stopped:
                raise StateError("the runtime is closed")
            yield

    @property
    @abc.abstractmethod
    def granularity(self) -> int:
        """Bytes to which layouts are rounded outward."""

    @abc.abstractmethod
    def num_mappings(self) -> int:
        """How many mappings the layers added so far need, when everything is built."""

    @abc.abstractmethod
    def shard(self, layer: Layer, weight: str, owner: Owner) -> torch.Tensor:
        """``[n, ...]``: the experts that ``owner`` holds, in its own memory: to be filled if that is this rank's, which
        is taken if need be; to be read if it was attached."""

    def offer(self, owner: Owner) -> None:
        """All shards of ``owner`` are taken, and filled: from now on others are given them."""
        with uninterrupted(), self._handing_over:
            self._there.add((owner, "device"))

    def hand_over(self, owner: Owner, place: Place) -> tuple[Place, list[Share]]:
        """The memory of all of ``owner``'s shards, in an order that all ranks know, at ``place`` or else where it is:
        this rank's own, or what another rank gave it, so that a survivor can serve the memory of the dead.

        Descriptors in it belong to the caller. Any thread may call. Raises `ExchangeError` if it is not here.
        """
        with self._handing_over:
            others: list[Place] = ["device", "host", "nowhere"]
            at = next((each for each in (place, *others) if (owner, each) in self._there), None)
            if at is None:
                raise ExchangeError(f"rank {self.rank} does not hold the memory of {in_words(owner)}")
            if at == "nowhere":
                return at, []
            if (owner, at) not in self._received:
                return at, self._export(owner, at)
            shares: list[Share] = []
            try:
                for share in self._received[owner, at]:
                    shares.append(share.duplicate() if isinstance(share, Descriptor) else share)  # noqa: PERF401
            except BaseException:
                close_shares(shares)
                raise
            return at, shares

    @abc.abstractmethod
    def _export(self, owner: Owner, place: Place) -> list[Share]:
        """The shares of memory that this rank created."""

    @abc.abstractmethod
    def num_shares(self, owner: Owner, place: Place = "device") -> int:
        """How many shares of ``owner`` there are."""

    def attach(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        """Make another owner's memory readable, if it is on the device; takes over ``shares``, and keeps them for a
        rank that comes back."""
        self._take_over(owner, place, shares, self._attach)

    @abc.abstractmethod
    def _attach(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None: ...

    def adopt(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None:
        """Make memory that this rank had created before it died its own again; takes over ``shares``."""
        self._take_over(owner, place, shares, self._adopt)

    @abc.abstractmethod
    def _adopt(self, owner: Owner, place: Place, shares: Sequence[Share]) -> None: ...

    def _take_over(
        self,
        owner: Owner,
        place: Place,
        shares: Sequence[Share],
        use: Callable[[Owner, Place, Sequence[Share]], None],
    ) -> None:
        self.drop(owner, place)
        for share in shares:
            if isinstance(share, Descriptor):
                self._resources.push(share)
        self._received[owner, place] = list(shares)
        use(owner, place, shares)
        with uninterrupted(), self._handing_over:
            self._there.add((owner, place))

    def drop(self, owner: Owner, place: Place) -> None:
        """Let go of memory that `attach` or `adopt` was given, of which nothing is mapped any more."""
        with uninterrupted(), self._handing_over:
            self._there.discard((owner, place))
            shares = self._received.pop((owner, place), [])
            for share in shares:
                if isinstance(share, Descriptor):
                    self._resources.close_one(share)

    @abc.abstractmethod
    def writing(self, layer: Layer, weight: str, owner: Owner) -> AbstractContextManager[torch.Tensor]:
        """`shard` of an owner whose memory is this rank's, to be written once more while the context lasts."""

    @abc.abstractmethod
    def check_integrity(self) -> None:
        """Raise `StateError` unless the ledger and the layouts agree on what is mapped."""

    @abc.abstractmethod
    def build(self) -> None:
        """Take the slots and make the weights, once all other owners are attached. What is there already stays."""

    # -- asleep: see [Note: Asleep] in `vmm_dwdp.memory.sleep` ---------------------------------------------------------
    def require_can_sleep(self) -> None:
        """Raise `StateError` if this memory does not come back at its addresses."""
        raise StateError("assembly: tensor_list cannot sleep: ordinary memory does not come back at its addresses")

    def is_there(self, owner: Owner, place: Place) -> bool:
        """Whether all shards of ``owner`` are here, at ``place``."""
        return (owner, place) in self._there

    def save(self) -> None:
        """Copy this rank's shards to host memory, unless they are there. If it raises, nothing has changed."""
        self.require_can_sleep()

    def give_up(self) -> None:
        """No bytes are kept, of any rank's shards; `give_back` comes next."""
        self.require_can_sleep()

    def forget_saved(self) -> None:
        """What `save` has copied may not be true any more; the memory stays for the next time."""
        self.require_can_sleep()

    def let_go(self) -> None:
        """Unmap what other ranks hold."""
        self.require_can_sleep()

    def give_back(self) -> None:
        """Unmap everything but the pool of host memory, and release what this rank has taken of its device."""
        self.require_can_sleep()

    def take_again(self) -> None:
        """Undo `give_back`: own shards, as they were saved, slots and cache; `attach` and `build` come next."""
        self.require_can_sleep()

    @abc.abstractmethod
    def weights(self, layer: Layer, mode: Mode) -> Weights:
        """What `acquire` returns for the layer, in a mode that the config allows."""

    @abc.abstractmethod
    def tensor_list(self, layer: Layer, weight: str, mode: Mode) -> list[torch.Tensor]:
        """What `weights` has in this mode of one weight, as contiguous tensors in expert order: before the rank's own
        experts, its own, and after them."""

    def copies(self, layer: Layer, segments: Sequence[Segment]) -> list[Copy]:
        """The addresses of planned segments."""
        return [
            Copy(
                self._destination(layer, weight, run.start),
                self._source(layer, weight, owner, run.start),
                len(run),
            )
            for weight, owner, run in segments
        ]

    def require_copied(self, layer: Layer, segments: Sequence[Segment]) -> None:
        """Raise `StateError` unless planned segments have their owners' bytes; no copy of them is under way."""
        for (weight, owner, run), copy in zip(segments, self.copies(layer, segments), strict=True):
            for offset in range(0, copy.nbytes, _COMPARED_NBYTES):
                shape = (min(_COMPARED_NBYTES, copy.nbytes - offset),)
                with self.touching():
                    held, owned = (
                        tensor_at(address + offset, shape, torch.uint8, self._driver.device)
                        for address in (copy.dst, copy.src)
                    )
                    same = torch.equal(held, owned)
                if not same:
                    whose = f"layer {layer.number}, {weight}: what this rank has of {in_words(owner)}"
                    raise StateError(f"{whose}, from byte {run.start + offset} on, are other bytes than its owner's")

    def forget_kept(self) -> None:
        """The owners are about to change their bytes, or to give them back: no copies of them are read any more, in the
        cache before it is filled again. The device is idle."""
        if self.cache is not None:
            self.cache.forget()
        if self.bank is not None:
            self.bank.empty()

    def refill_kept(self) -> None:
        """What `forget_kept` has left in the cache is copied once more. Raises `DriverError` if that fails."""
        if self.cache is not None:
            self.cache.refill()

    def require_kept(self) -> None:
        """Raise `StateError` unless cache and bank have their owners' bytes. Waits for the device."""
        with self.touching():
            if self.cache is not None:
                self.cache.verify()
            if self.bank is not None:
                self.bank.verify()

    @abc.abstractmethod
    def _destination(self, layer: Layer, weight: str, byte: int) -> Address: ...

    @abc.abstractmethod
    def _source(self, layer: Layer, weight: str, owner: Owner, byte: int) -> Address: ...

    def stop(self) -> None:
        """Let nobody touch this memory any more. Needs no device."""
        with self._touches:
            self._stopped = True

    def close(self) -> None:
        """Free everything in which no caller's tensor lies, and warn of the rest. The device is idle.

        Another call frees what has been let go since, and tries again what failed.
        """
        kept = []
        for memory in self._ranges:
            if memory.in_use():
                label = memory.memory.label
                warnings.warn(f"{label} stays, as a tensor over it is still held", ResourceWarning, stacklevel=3)
                kept.append(memory)
            else:
                self._resources.push(memory.memory)
        self._ranges = kept
        self._resources.close()

    def _layers_of_slot(self) -> list[Sequence[Layer]]:
        """For each slot the layers that use it: the i-th layer uses slot ``i % prefetch_depth``."""
        return [self._layers[slot :: self._depth] for slot in range(min(self._depth, len(self._layers)))]

    def _weights_of_layers(self) -> Iterator[tuple[Layer, str]]:
        """Every weight of every layer, in the order in which all ranks list memory."""
        for layer in self._layers:
            for weight in layer.weights:
                yield layer, weight

    def _parts(self, layer: Layer, weight: str) -> Iterator[range]:
        """The runs of experts of `tensor_list`, empty ones left out."""
        own = layer.placement.experts(self.rank)
        for run in range(own.start), own, range(own.stop, layer.placement.num_experts):
            if run:
                yield run
