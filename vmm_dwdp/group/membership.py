"""One rank's part in its group: what it gives to the other ranks and what it takes from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Descriptor, Ledger, ResourceStack, Stream
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import DWDPConfig
from vmm_dwdp.errors import ConfigError, DriverError, ExchangeError, StateError
from vmm_dwdp.group.agreement import GIVEN_UP, LAST_STEP
from vmm_dwdp.group.doors import Where, open_door
from vmm_dwdp.group.exchange import Exchange, Numbers
from vmm_dwdp.group.limits import DescriptorReservation
from vmm_dwdp.group.order import latest_order, order_of
from vmm_dwdp.group.settle import settle
from vmm_dwdp.group.update import ShardKey, Shards, Update
from vmm_dwdp.layout.auto import AutoExperts
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.layer import Layer, Layers
from vmm_dwdp.layout.placement import HOST, Owner, in_words
from vmm_dwdp.layout.turns import chooses
from vmm_dwdp.memory.assembly import Assembly, Place, Share
from vmm_dwdp.memory.checksum import checksum
from vmm_dwdp.memory.lines import SharedLines

LINES_CREATOR: Final = 0  # the rank that makes the lines by which runs are chosen
HOST_CREATOR: Final = 0  # the rank that creates, fills and serves the pool of host memory


class RankState(Protocol):
    """Whether a rank sleeps."""

    @property
    def is_asleep(self) -> bool: ...

    def fall_asleep(self) -> None:
        """From now on no layer is acquired."""

    def wake_up(self) -> None:
        """Layers may be acquired again."""


class Membership:
    """Publishes a rank's shards, attaches the others', and changes weights together with them.

    Args:
        assembly: the rank's memory; owned by the caller.
        layers: what was added so far, by the caller.
        state: of this rank.

    Attributes:
        config: as it was given; once the ranks have settled on a number of experts, with that.
        shards: what this rank holds.
        lines: what the ranks of this machine say of whom they pull from, from `publish` or `rejoin` on, if they do.
    """

    lines: SharedLines | None = None

    def __init__(
        self,
        config: DWDPConfig,
        rank: int,
        driver: Driver,
        ledger: Ledger,
        rendezvous: Where,
        assembly: Assembly,
        layers: Layers,
        state: RankState,
    ) -> None:
        self.config = self._stated = config
        self._rank = rank
        self._driver = driver
        self._ledger = ledger
        self._door = open_door(rendezvous, rank, config.group_size)
        self._assembly = assembly
        self._layers = layers.in_order
        self._numbered = layers
        self._state = state
        self._others = [other for other in range(config.group_size) if other != rank]
        self._exchange: Exchange | None = None
        self._checksums: dict[Owner, list[int]] = {}  # of every shard, in the order of layers and weights
        self._resources = ResourceStack()
        self._edge_stream: Stream | None = None
        self._descriptors: DescriptorReservation | None = None
        self.shards = Shards(driver, assembly, self.held_owners, layers)

    @property
    def held_owners(self) -> tuple[Owner, ...]:
        """The owners whose memory this rank creates."""
        hosts = self.config.host_experts > 0 and self._rank == HOST_CREATOR
        return (self._rank, HOST) if hosts else (self._rank,)

    @property
    def half_updated(self) -> str | None:
        """Why weights may be partly old and partly new; ``None`` if they are not."""
        return None if self._exchange is None else self._exchange.doubt

    def require_updated(self) -> None:
        """Raise `StateError` if weights may be partly old and partly new, or in an order that nobody here has heard."""
        if (why := self.half_updated) is not None:
            if GIVEN_UP in why:
                raise StateError(f"weights are gone: {why}; update all of them, or close")
            raise StateError(f"weights are partly old and partly new: {why}; update again, or close")
        self._assembly.tables.require_told()

    def settle(self, offer: int | ConfigError, timeout: float) -> None:
        """Agree on how many experts each rank holds, and describe the layers for that. See `DWDPRuntime.settle`."""
        deadline = time.monotonic() + timeout
        self._exchange = self._make_exchange(timeout)
        self._exchange.serve(deadline)
        self._settle_on(settle(self._exchange, offer, deadline), self._exchange)

    def _settle_on(self, number: int, exchange: Exchange) -> None:
        auto = AutoExperts(self._stated, tuple(layer.placement.num_experts for layer in self._layers))
        self._numbered.spread(auto.settled(number), self._rank, self._assembly.granularity)
        self.config = auto.settled(number)
        exchange.settled = number

    def publish(self, timeout: float, revision: str | None) -> None:
        """Serve this rank's shards, attach the others', and build the assembly; every rank has done so on return."""
        deadline = time.monotonic() + timeout
        self._check_limits()
        for owner in self.held_owners:
            for layer, weight in self._weights():
                with self._assembly.touching():
                    self._assembly.shard(layer, weight, owner)
            self._assembly.offer(owner)
        self._driver.synchronize()  # what the caller copied into the shards is there before anybody reads it
        self._sum_held_shards()
        if self._chooses_runs and self._rank == LINES_CREATOR:
            with uninterrupted():
                self.lines = SharedLines.make(self._ledger, self._rank, self.config.group_size)
        if self._exchange is None:
            self._exchange = self._make_exchange(timeout)
            self._exchange.serve(deadline)
        exchange = self._exchange
        exchange.state(revision, timeout)
        with exchange.attempt("publish", "publish", deadline):
            self._take_lines(exchange, LINES_CREATOR, deadline)
            for owner in self._other_owners():
                self._take(exchange, owner, HOST_CREATOR if owner == HOST else owner, deadline)
            with self._assembly.touching():
                self._assembly.build()
            self._fill_edges()
            exchange.step(1, "publish: this rank has all it needs", deadline)
            exchange.step(LAST_STEP, "publish: all have", deadline)
            exchange.be_published()
        self._settle_limits()

    def rejoin(self, timeout: float, revision: str | None) -> bool:
        """As `publish`, with the memory of a dead rank of the same number, which a living one hands over.

        Returns whether the group sleeps: then this rank has what was saved, and builds nothing before it wakes.
        """
        deadline = time.monotonic() + timeout
        exchange = self._make_exchange(timeout)
        exchange.state(revision, timeout)
        if exchange.listens(self._rank):
            raise StateError(f"rank {self._rank} is alive: only a rank that has died can rejoin")
        patience = timeout / self.config.group_size  # so that one that is stopped leaves time for another
        joined = exchange.join(deadline, patience)
        if joined is None:
            raise ExchangeError(f"no other rank is alive at {self._door.place}: the group must be loaded again")
        if self._stated.num_local_experts == "auto":
            if joined.settled is None:
                raise ExchangeError(f"rank {joined.holder} does not tell how many experts a rank holds")
            self._settle_on(joined.settled, exchange)
        self._check_limits()
        holder, asleep = joined.holder, joined.asleep
        self._take_lines(exchange, holder, deadline)
        if self.config.movable_experts:
            self._assembly.tables.change(order_of(exchange, holder, self._layers, deadline))
        for owner in (*self.held_owners, *self._other_owners()):
            places: tuple[Place, ...] = ("host", "device", "nowhere") if asleep and owner != HOST else ("device",)
            self._take(exchange, owner, holder, deadline, places)
        if not asleep:
            with self._assembly.touching():
                self._assembly.build()
        self._exchange = exchange
        if exchange.doubt is not None:  # nobody knows how far the dead rank came
            self.shards.begun.update(self.shards.held())
        exchange.serve(deadline)
        self._settle_limits()
        return asleep

    @contextmanager
    def updating(self, timeout: float, moved: ExpertOrder | None = None) -> Iterator[Update]:
        """Every rank runs the body, in which it writes, or none does; no rank reads meanwhile. See
        `DWDPRuntime.updating`. With ``moved``, the same on all ranks, experts are in that order from now on."""
        assert self._exchange is not None
        unfinished = self.unfinished()
        tables, deadline = self._assembly.tables, time.monotonic() + timeout
        self.shards.begin_moving(moved or tables.order)
        stated = ("update: this rank reads nothing", deadline, str(tables.order.version))
        try:
            with self._exchange.attempt("move" if moved else "update", *stated):
                if self.config.movable_experts:
                    tables.change(moved or latest_order(self._exchange, tables.order, self._layers, deadline))
                update = Update(self._assembly, self.shards, self._rank, self._numbered, unfinished)
                try:
                    yield update
                finally:
                    update.end()
                update.require_whole()
                deadline = time.monotonic() + timeout
                self._sum_held_shards()
                self._exchange.step(1, "update: this rank has written", deadline)
                self._fill_edges()
                for owner in self._other_owners():
                    self._learn_checksums(self._exchange, owner, HOST_CREATOR if owner == HOST else owner, deadline)
                self._exchange.step(LAST_STEP, "update: the edges of this rank are filled", deadline)
        except ExchangeError as error:
            if self._exchange.was_relied_on:
                raise
            raise ExchangeError(f"nothing was written: {error}") from error

    def unfinished(self) -> frozenset[ShardKey]:
        """The shards that an update which did not end well may have left half written: the next has to write them."""
        if self.half_updated is None:
            self.shards.begun.clear()
        return frozenset(self.shards.begun)

    def verify(self) -> None:
        """Raise `StateError` unless every shard has the bytes that its owner published."""
        if not self.config.checksums:
            raise ConfigError("check_integrity(verify=True) needs checksums: true in the config")
        for owner, published in self._checksums.items():
            for (layer, weight), expected in zip(self._weights(), published, strict=True):
                if self._sum(layer, weight, owner) != expected:
                    whose = f"layer {layer.number}, {weight}: the bytes of {in_words(owner)}"
                    raise StateError(f"{whose} are not those that were published")

    def peers(self, timeout: float) -> dict[int, bool]:
        """For every other rank, whether it answers in so many seconds."""
        assert self._exchange is not None
        return {rank: self._exchange.alive(rank, time.monotonic() + timeout) for rank in self._others}

    def leave(self) -> None:
        """Stop answering others, which needs no device. A second call goes on where one stopped."""
        if self._exchange is None:
            self._door.leave()
        else:
            self._exchange.close()

    def forget(self) -> None:
        """In a forked child: nothing that the parent keeps open is to look open when the parent is gone."""
        self._door.forget()
        if self._exchange is not None:
            self._exchange.forget()

    def close(self) -> None:
        """Free what updates need; the device is idle."""
        self._resources.close()
        if self.lines is not None:
            self.lines.close()
        if self._descriptors is not None:
            self._descriptors.close()

    def _weights(self) -> Iterator[tuple[Layer, str]]:
        for layer in self._layers:
            for weight in layer.weights:
                yield layer, weight

    def _other_owners(self) -> list[Owner]:
        """The owners whose memory others create, in an order that differs from rank to rank."""
        group_size = self.config.group_size
        owners: list[Owner] = [*((self._rank + turn) % group_size for turn in range(1, group_size)), HOST]
        return [owner for owner in owners if owner not in self.held_owners and self._assembly.num_shares(owner)]

    def _check_limits(self) -> None:
        needed = self._assembly.num_mappings()
        if needed > self._driver.max_mappings:
            raise ConfigError(
                f"{len(self._layers)} layers need {needed} mappings, but a process can have {self._driver.max_mappings}"
            )
        self._leave_descriptors()

    def _leave_descriptors(self) -> None:
        """Where shares are descriptors, for each that is received, and while memory is handed over, for each that is
        held here and each rank that asks for it. On the host driver the imported handle is one, too."""
        received = sum(map(self._assembly.num_shares, self._other_owners()))
        held = sum(map(self._assembly.num_shares, self.held_owners))
        count = received + len(self._others) * held if self._door.takes_descriptors else 0
        count += received if self._driver.name == "host" else 0
        count += 1 + len(self._others) if self._chooses_runs else 0
        with uninterrupted():
            before, self._descriptors = self._descriptors, DescriptorReservation(count)
            if before is not None:
                before.close()

    def _settle_limits(self) -> None:
        assert self._descriptors is not None
        self._descriptors.settle()

    def _make_exchange(self, patience: float) -> Exchange:
        return Exchange(
            self._door,
            self._ledger,
            self._rank,
            self.config.group_size,
            patience,
            self._fingerprint(),
            self._shares,
            self._numbers,
            lambda: self._state.is_asleep,
            self._share_lines,
        )

    def _fingerprint(self) -> str:
        """A digest of everything in which all ranks must agree."""
        layers = [
            (layer.number, [(name, spec.shape, str(spec.dtype)) for name, spec in layer.weights.items()])
            for layer in self._layers
        ]
        config = dataclasses.asdict(self._stated)
        agreed = json.dumps([config, self._assembly.granularity, self._driver.device.type, layers])
        return hashlib.sha256(agreed.encode()).hexdigest()

    def _numbers(self, what: Numbers, owner: Owner) -> list[int]:
        """Runs in a thread of the exchange."""
        return self._checksums.get(owner, [])

    def _shares(self, owner: Owner, place: Place) -> tuple[Place, list[Share]]:
        """Runs in a thread of the exchange."""
        with self._driver.current():
            return self._assembly.hand_over(owner, place)

    @property
    def _chooses_runs(self) -> bool:
        """Whether the ranks, which are on one machine, tell each other from whom they pull."""
        return self._door.takes_descriptors and chooses(self.config)

    def _take_lines(self, exchange: Exchange, holder: int, deadline: float) -> None:
        if self._chooses_runs and self.lines is None:
            descriptor = exchange.collect_lines(holder, deadline)
            with uninterrupted():
                self.lines = SharedLines(descriptor, self._rank, self.config.group_size)

    def _share_lines(self) -> Descriptor:
        """Runs in a thread of the exchange."""
        if self.lines is None:
            raise ExchangeError(f"rank {self._rank} has no lines by which runs are chosen")
        return self.lines.share()

    def _take(
        self, exchange: Exchange, owner: Owner, holder: int, deadline: float, places: Sequence[Place] = ("device",)
    ) -> None:
        """Get the memory of ``owner`` from rank ``holder``: to read, or, if it was this rank's before, to hold.

        ``places``: where it may be, the preferred one first.
        """
        count = self._assembly.num_shares(owner)
        at: Place = places[0]
        shares: list[Share] = []
        if count:  # nobody keeps what has no pages
            counts = {place: self._assembly.num_shares(owner, place) for place in places}
            at, shares = exchange.collect(owner, holder, counts, deadline)
        take = self._assembly.adopt if owner in self.held_owners else self._assembly.attach
        try:
            with self._assembly.touching():
                take(owner, at, shares)
        except DriverError as error:  # where the GPUs cannot reach each other, only this tells which ones
            attempt = f"use the memory of {in_words(owner)} on {self._driver.device}: {error.attempt}"
            raise DriverError(error.call, error.code, attempt) from error
        if count:
            self._learn_checksums(exchange, owner, holder, deadline)

    def _fill_edges(self) -> None:
        """Copy the neighbours' bytes that share a page with this rank's own; they stay there until an update."""
        copies = [copy for layer in self._layers for copy in self._assembly.copies(layer, layer.plan.edges)]
        if not copies:
            return
        with self._assembly.touching():
            if self._edge_stream is None:
                self._edge_stream = self._resources.push(Stream(self._driver, self._ledger, "edges"))
            self._driver.copy(self._driver.prepare(copies), self._edge_stream.stream)
            self._driver.synchronize(self._edge_stream.stream)

    def _sum_held_shards(self) -> None:
        if self.config.checksums:
            for owner in self.held_owners:
                self._checksums[owner] = [self._sum(layer, weight, owner) for layer, weight in self._weights()]

    def _sum(self, layer: Layer, weight: str, owner: Owner) -> int:
        with self._assembly.touching():
            return checksum(self._assembly.shard(layer, weight, owner))

    def _learn_checksums(self, exchange: Exchange, owner: Owner, holder: int, deadline: float) -> None:
        if self.config.checksums:
            count = sum(1 for _ in self._weights())
            self._checksums[owner] = exchange.collect_numbers("checksums", owner, holder, count, deadline)
