"""One rank from set-up to close: what it states, fills, publishes, and gives back."""

from __future__ import annotations

import logging
import os
import reprlib
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self, SupportsIndex
from weakref import WeakSet

import torch

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Failures, Ledger, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.group.addresses import TCPRendezvous
from vmm_dwdp.group.doors import Where
from vmm_dwdp.group.rebalance import MovingMembership
from vmm_dwdp.layout.auto import AutoExperts, with_local_experts
from vmm_dwdp.layout.layer import Layers, describe_layer
from vmm_dwdp.layout.needs import MemoryNeeded, memory_needed
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.memory.choice import make_assembly
from vmm_dwdp.memory.room import as_many_as_fit, told_of_room
from vmm_dwdp.observe.exchanges import Exchanges
from vmm_dwdp.schedule.lifecycle import Lifecycle
from vmm_dwdp.schedule.schedule import Schedule
from vmm_dwdp.temporary import sweep

_log = logging.getLogger("vmm_dwdp")


class Rank:
    """The memory of one rank and its place in the group, from set-up to close.

    `Together` adds what ranks do together once they are published, and `DWDPRuntime` the passes.
    """

    def __init__(
        self,
        config: DWDPConfig,
        rank: int,
        device: str | torch.device,
        rendezvous: Where,
        *,
        driver: Driver | None = None,
    ) -> None:
        if not isinstance(rank, SupportsIndex):
            raise ConfigError(f"rank must be a whole number, not {reprlib.repr(rank)}")
        if not 0 <= rank < config.group_size:
            raise ConfigError(f"rank {rank} is not in a group of {config.group_size}")
        self.rank = rank
        self.ledger = Ledger()
        self._driver = driver or open_driver(torch.device(device))
        self._current_device = self._driver.current_device
        self._index = self._driver.index
        self._lifecycle = Lifecycle()
        self._is_auto = config.num_local_experts == "auto"
        self._settling = threading.Lock()
        self._layers = Layers()
        layers = self._layers.in_order
        if rank == 0:
            sweep(rendezvous if isinstance(rendezvous, str | os.PathLike) else None)
        with self._driver.current():
            over_network = isinstance(rendezvous, TCPRendezvous)
            self._assembly = make_assembly(config, rank, self._driver, self.ledger, layers, over_network=over_network)
            taking = (self._driver, self.ledger, rendezvous, self._assembly, self._layers, self._lifecycle)
            self._membership = MovingMembership(config, rank, *taking)
            self._schedule = Schedule(self._driver, self.ledger, self._assembly, layers, config)
            self._exchanges = Exchanges(self._driver, self.ledger, layers)
        self._last_layer: int | None = None  # the number of the one that a pass ends with
        _open.add(self)

    @property
    def config(self) -> DWDPConfig:
        """As it was given; with ``num_local_experts="auto"``, once the ranks have settled on a number, with that, which
        is ``None`` where it is an equal share."""
        return self._membership.config

    @property
    def _is_settled(self) -> bool:
        return self.config.num_local_experts != "auto"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._driver.device

    @property
    def published(self) -> bool:
        """Whether passes may run: from the end of `publish` or `rejoin` to `close`."""
        return self._lifecycle.is_running

    @property
    def closed(self) -> bool:
        """Whether `close` was called. What it could not free, the ledger tells."""
        return self._lifecycle.is_closed

    def __repr__(self) -> str:
        state = "published" if self.published else "closed" if self.closed else "set-up"
        what = f"rank {self.rank} of {self.config.group_size} on {self.device}"
        return f"<{type(self).__name__}: {what}, {len(self._layers.in_order)} layers, {state}>"

    # -- set-up ------------------------------------------------------------------------------------------------------
    def add_layer(self, layer: int, weights: Mapping[str, WeightSpec]) -> None:
        """State a layer's weights, all ``[E, ...]`` with the same ``E``, in the order in which a pass reads them.

        Takes no memory. Layers are numbered as the caller likes, and stated in the order of a pass.

        Raises:
            ConfigError: the layer was added already, its weights disagree, or its experts cannot be spread like this.
            StateError: after `publish`, or after `settle`.
        """
        self._lifecycle.require_setup("add_layer")
        if self._is_auto and self._is_settled:
            raise StateError("add_layer after settle: with num_local_experts: auto all layers are added before it")
        config = self.config if self._is_settled else with_local_experts(self.config, None)
        with self._driver.current():
            described = describe_layer(layer, weights, config, self.rank, self._assembly.granularity)
        self._layers.add(described)

    def settle(self, timeout: float = 60.0) -> None:
        """With ``num_local_experts="auto"``: agree with the other ranks on how many experts each of them holds.

        Every rank of the group calls it, once it has added its layers, and offers as many as it has room for (see
        `DWDPConfig.memory_bytes`); the least offer is what all hold, and what `config` says from then on. Where
        nobody has called it, `local_experts`, `local_shard` and `publish` do. A second call, and one without
        ``"auto"``, changes nothing. If it raises, the runtime is closed, and no memory was taken.

        Args:
            timeout: seconds to wait for the other ranks.

        Raises:
            ConfigError: there is no layer; or a rank, which is named, has no room for an equal share.
            ExchangeError: a rank, which is named, did not come in time, or left; it has a different config or different
                layers; or the others have settled before, without this process.
            StateError: after `publish`, or after `close`.
        """
        self._lifecycle.require_setup("settle")
        with self._settling:
            if self._is_settled:
                return
            self._lifecycle.require_setup("settle")  # still, after waiting for another thread
            if not self._layers.in_order:
                raise ConfigError("settle needs at least one layer")
            counts = tuple(layer.placement.num_experts for layer in self._layers.in_order)
            with self._closed_on_failure(), self._driver.current():
                auto = AutoExperts(self.config, counts)
                offer = as_many_as_fit(auto, self.rank, self.memory_needed, self.device)
                self._membership.settle(offer, timeout)
        held = "an equal share" if self.config.num_local_experts is None else f"{self.config.num_local_experts} each"
        _log.info("rank %d: the ranks hold %s of every layer's experts, and %s fit here", self.rank, held, offer)

    def _settle_first(self, timeout: float = 60.0) -> None:
        if not self._is_settled:
            self.settle(timeout)

    def memory_needed(self, config: DWDPConfig | None = None) -> MemoryNeeded:
        """What this rank takes for the layers added so far, in bytes; nothing is taken by asking.

        Args:
            config: of a group in which it would be the same rank, with the same ``assembly``; by default its own, and
                an equal share as long as the ranks have not settled on more.

        Raises `ConfigError` if ``config`` cannot spread these layers.
        """
        layers = self._layers.in_order
        if config is None:
            return memory_needed(layers, self.config, self.rank)
        with self._driver.current():
            page = self._assembly.granularity
        described = [describe_layer(layer.number, layer.weights, config, self.rank, page) for layer in layers]
        return memory_needed(described, config, self.rank)

    def local_experts(self, layer: int, owner: Owner | None = None) -> range:
        """The experts that this rank, or ``owner``, holds of ``layer``, as long as none has moved.

        Raises:
            ConfigError: there is no such; or what `settle` raises, which comes first.
            StateError: `rebalance` has moved experts of the layer: `held_experts` tells which are where.
        """
        owner = self.rank if owner is None else owner
        self._layers.numbered[layer].placement.experts(owner)  # what cannot be is refused before others are waited for
        self._settle_first()
        held = self._membership.shards.experts(self._layers.numbered[layer], owner)
        if not isinstance(held, range):
            raise StateError(f"experts of layer {layer} have moved: held_experts({layer}) tells who holds which")
        return held

    def local_shard(self, layer: int, weight: str, owner: Owner | None = None) -> torch.Tensor:
        """A tensor ``[n, ...]`` over this rank's own pages of a weight: fill it with the experts `local_experts`.

        ``owner="host"`` is the pool of host memory, on the rank that creates it (rank 0), and a tensor on the CPU. The
        memory is taken by the first call and is undefined until it is filled. The tensor may be kept; writing to it
        after `publish` changes what other ranks read, without telling them.

        Raises:
            ConfigError: no such layer, weight or owner here.
            DriverError: memory could not be had; the runtime is closed then.
            StateError: after `publish`.
            DWDPError: what `settle` raises, which comes first.
        """
        self._lifecycle.require_setup("local_shard")
        self._layers.with_weight(layer, weight)
        owner = self.rank if owner is None else owner
        self._membership.shards.require_held(owner)
        self._settle_first()
        described = self._layers.numbered[layer]
        with self._closed_on_failure(), self._driver.current(), self._told_of_room(), uninterrupted():
            return self._assembly.shard(described, weight, owner)

    @property
    def held_owners(self) -> tuple[Owner, ...]:
        """The owners whose memory this rank creates: itself, and on rank 0 the pool of host memory if there is one."""
        return self._membership.held_owners

    def publish(self, timeout: float = 60.0, *, revision: str | None = None) -> None:
        """Serve this rank's shards, map those of the others, and start prefetching.

        Waits for the device, and at most ``timeout`` seconds for the other ranks; as long may a request of another rank
        take from then on. When it returns, every rank has what it needs, and none depends on another's being alive. If
        it raises, the runtime is closed and nothing stays allocated.

        Args:
            revision: what the shards were filled from, for example the commit of a checkpoint. Any string, equal on all
                ranks: otherwise publish is refused on every rank, as experts of several checkpoints would be mixed.

        Raises:
            ConfigError: there is no layer; the layers need more mappings or descriptors than a process can have; or the
                resident cache does not fit.
            ExchangeError: a rank, which is named, did not come in time, or has a different config, different layers or
                another ``revision``.
            DriverError: memory could not be had.
            StateError: published before.
        """
        with self._ready_afterwards("publish"):
            self._settle_first(timeout)
            self._membership.publish(timeout, revision)
            self._start()

    def rejoin(self, timeout: float = 60.0, *, revision: str | None = None) -> None:
        """Instead of filling shards and `publish`: take the place of a rank of the same number that has died.

        A living rank hands over the dead one's memory, filled as it was; nothing is read from a checkpoint, and the
        others go on meanwhile. Where the rank may have died while an update was written, or a living one does not tell
        in its part of ``timeout``, no layer can be acquired here until an `update` succeeds to which this rank gives
        all of its shards. Where the group sleeps, this rank does, too, until `wake` on all. If it raises, the runtime
        is closed and nothing stays allocated.

        Args:
            revision: as the group's ranks gave it to `publish`.

        Raises:
            ConfigError: there is no layer.
            ExchangeError: no living rank holds what this rank needs; or their configs, layers or ``revision`` differ;
                or they are not published.
            StateError: a rank of this number is alive; or published before; or with ``assembly: tensor_list``, whose
                memory goes with the process that created it.
        """
        asleep = False
        with self._ready_afterwards("rejoin"):
            asleep = self._membership.rejoin(timeout, revision)
            if not asleep:
                self._start()
        if asleep:
            self._lifecycle.fall_asleep()

    @contextmanager
    def _ready_afterwards(self, call: str) -> Iterator[None]:
        """The body gives this rank all the memory that it needs: then passes can begin."""
        self._lifecycle.require_setup(call)
        if not self._layers.in_order:
            raise ConfigError(f"{call} needs at least one layer")
        with self._closed_on_failure(), self._driver.current(), self._told_of_room():
            yield
        self._last_layer = self._layers.in_order[-1].number
        self._lifecycle.publish()
        ready = len(self._layers.in_order)
        memory = tuple(nbytes >> 20 for nbytes in (self._assembly.resident_nbytes, self._assembly.staged_nbytes))
        _log.info("rank %d: %d layers ready, %d MiB resident, %d MiB staged", self.rank, ready, *memory)

    def _start(self) -> None:
        with self._assembly.touching():
            self._schedule.start(self._membership.lines)
            self._begin()

    def _begin(self) -> None:
        """Passes can begin."""

    def _end(self) -> None:
        """No pass can begin any more. Needs no device."""

    # -- looking ------------------------------------------------------------------------------------------------------
    def check_integrity(self, *, verify: bool = False) -> None:
        """Check that what is mapped and what the slots hold is what the layouts say; meant for moments of idleness.

        With ``verify``, also that the bytes of every shard, this rank's and the others', are what its owner published,
        and that edges, slots and the resident cache have the same. That waits for the device, reads all shards, over
        the link where they are remote, and needs ``checksums: true`` in the config.

        Raises:
            StateError: something disagrees; the sentence says what.
            ConfigError: ``verify`` without ``checksums``.
        """
        with self._lifecycle.calls, self._undisturbed():
            self._assembly.check_integrity()
            if verify:
                self._membership.verify()
            self._schedule.check_integrity(verify=verify)

    def peers(self, timeout: float = 5.0) -> dict[int, bool]:
        """For every other rank, whether it answers within ``timeout`` seconds; one that has left is not waited for."""
        self._lifecycle.require_published()
        return self._membership.peers(timeout)

    # -- the end -----------------------------------------------------------------------------------------------------
    def close(self) -> Ledger:
        """Wait for the device, and free all that nobody references; the ledger tells what is left.

        A range in which the caller still holds a tensor stays mapped, with a `ResourceWarning` that names it: the
        tensor reads old bytes instead of crashing the process. The next `close` frees it once it is let go.

        One step that fails does not stop the others: the first failure is raised at the end, with what is left in its
        notes, and the next `close` tries again. Where the device has failed, its memory goes with the process; sockets
        and threads are gone. In a child that was forked from the process of the runtime, it does nothing.
        """
        if self._lifecycle.is_forked:
            return self.ledger
        self._lifecycle.close()
        self._end()
        failures = Failures()
        for need_no_device in self._membership.leave, self._schedule.stop, self._assembly.stop:
            with failures.noted():
                need_no_device()
        with failures.noted(), self._driver.current():
            self._driver.synchronize()
            for free in (self._schedule.close, self._exchanges.close, self._membership.close, self._assembly.close):
                with failures.noted():
                    free()
            if not failures:
                self.ledger.sweep()
        left = ", ".join(f"{number} {kind}" for kind, number in self.ledger.counts().items() if number)
        failures.raise_first(f"left open: {left or 'nothing'}")
        return self.ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        """`close`. What the block raised stays what is raised: a failure to close becomes a note on it."""
        undo_after(error, self.close)

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # tensors in them would keep the memory that they are over
            undo_after(error, self.close)
            raise

    def _told_of_room(self) -> AbstractContextManager[None]:
        return told_of_room(self._assembly, self._layers.in_order, self.device, lambda: self.config, self.memory_needed)

    @contextmanager
    def _undisturbed(self) -> Iterator[bool]:
        """Once published: the device is current while the body runs, and no other thread is in a pass. Tells whether
        this one was not either."""
        self._lifecycle.require_idle()
        with self._driver.current(), self._lifecycle.undisturbed() as begins:
            yield begins


_open: WeakSet[Rank] = WeakSet()


def _after_fork() -> None:
    """A child has none of the threads, and what it has of sockets and locks is not to keep others waiting."""
    for rank in _open:
        rank._lifecycle.fork()
        rank._membership.forget()


os.register_at_fork(after_in_child=_after_fork)
