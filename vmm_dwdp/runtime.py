"""The runtime that a model runner imports: from shapes to tensors in which every expert is at its place."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any, Self
from weakref import WeakSet

import torch
import torch.distributed as dist

from vmm_dwdp.allocator import open_driver
from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.allocator.handles import Failures, Ledger, undo_after
from vmm_dwdp.allocator.uninterrupted import uninterrupted
from vmm_dwdp.config import DWDPConfig, ModeSetting
from vmm_dwdp.errors import ConfigError
from vmm_dwdp.group.membership import Membership, ShardKey
from vmm_dwdp.layout.layer import Layers, describe_layer
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.layout.weight_spec import WeightSpec
from vmm_dwdp.memory.assembly import Weights
from vmm_dwdp.memory.choice import make_assembly
from vmm_dwdp.observe.stats import Stats
from vmm_dwdp.observe.trace import Trace
from vmm_dwdp.schedule.compiled_models import between_regions, warn_of_with
from vmm_dwdp.schedule.lifecycle import Lifecycle
from vmm_dwdp.schedule.schedule import Schedule

_log = logging.getLogger("vmm_dwdp")


class DWDPRuntime:
    """One rank of a group that shares one copy of the experts.

    Set-up: `add_layer` for every MoE layer in the order of a pass, fill what `local_shard` returns, `publish`. Then,
    for every layer of every pass: `acquire`, the forward pass of the layer, `release`; no rank waits for another.
    `close` when done. A pass belongs to the thread that begins it; between passes any thread may call. Whatever
    device is current stays it. A forked child has to open a runtime of its own.

    Args:
        config: equal on all ranks of the group.
        rank: this process's place in the group, from 0.
        device: where the weights are; ``"cpu"`` is the host driver, which needs no GPU.
        rendezvous: a directory that all ranks of this group name and no other group does; it is made with mode 0700 if
            it is missing. Or a process group of the ranks.
        driver: an open driver of ``device`` to use instead of a new one, for example a host driver with small pages.

    Attributes:
        config: as it was given.
        rank: as it was given.
        ledger: what is open; all zeros after `close`.

    Raises:
        ConfigError: there is no such rank, or the machine lacks what the config asks for.
        ExchangeError: the rendezvous directory is not private.
        DriverError: the device cannot be used.
    """

    def __init__(
        self,
        config: DWDPConfig,
        rank: int,
        device: str | torch.device,
        rendezvous: str | os.PathLike[str] | dist.ProcessGroup,
        *,
        driver: Driver | None = None,
    ) -> None:
        if not 0 <= rank < config.group_size:
            raise ConfigError(f"rank {rank} is not in a group of {config.group_size}")
        self.config = config
        self.rank = rank
        self.ledger = Ledger()
        self._driver = driver or open_driver(torch.device(device))
        self._current_device = self._driver.current_device
        self._index = self._driver.index
        self._lifecycle = Lifecycle()
        self._layers = Layers()
        layers = self._layers.in_order
        with self._driver.current():
            self._assembly = make_assembly(config, rank, self._driver, self.ledger, layers)
            self._membership = Membership(config, rank, self._driver, self.ledger, rendezvous, self._assembly, layers)
            self._schedule = Schedule(self._driver, self.ledger, self._assembly, layers, config)
        self._last_layer: int | None = None  # the number of the one that a pass ends with
        _open.add(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._driver.device

    # -- set-up ------------------------------------------------------------------------------------------------------
    def add_layer(self, layer: int, weights: Mapping[str, WeightSpec]) -> None:
        """State a layer's weights, all ``[E, ...]`` with the same ``E``, in the order in which a pass reads them.

        Takes no memory. Layers are numbered as the caller likes, and stated in the order of a pass.

        Raises:
            ConfigError: the layer was added already, its weights disagree, or its experts cannot be spread like this.
            StateError: after `publish`.
        """
        self._lifecycle.require_setup("add_layer")
        with self._driver.current():
            described = describe_layer(layer, weights, self.config, self.rank, self._assembly.granularity)
        self._layers.add(described)

    def local_experts(self, layer: int, owner: Owner | None = None) -> range:
        """The experts that this rank, or ``owner``, holds of ``layer``; raises `ConfigError` if there is no such."""
        return self._layers.numbered[layer].placement.experts(self.rank if owner is None else owner)

    def local_shard(self, layer: int, weight: str, owner: Owner | None = None) -> torch.Tensor:
        """A tensor ``[n, ...]`` over this rank's own pages of a weight: fill it with the experts `local_experts`.

        ``owner="host"`` is the pool of host memory, on the rank that creates it (rank 0), and a tensor on the CPU. The
        memory is taken by the first call and is undefined until it is filled. The tensor may be kept; writing to it
        after `publish` changes what other ranks read, without telling them.

        Raises:
            ConfigError: no such layer, weight or owner here.
            DriverError: memory could not be had; the runtime is closed then.
            StateError: after `publish`.
        """
        self._lifecycle.require_setup("local_shard")
        described = self._layers.with_weight(layer, weight)
        owner = self.rank if owner is None else owner
        self._membership.require_held(owner)
        with self._closed_on_failure(), self._driver.current(), uninterrupted():
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
            self._membership.publish(timeout, revision)

    def rejoin(self, timeout: float = 60.0, *, revision: str | None = None) -> None:
        """Instead of filling shards and `publish`: take the place of a rank of the same number that has died.

        A living rank hands over the dead one's memory, filled as it was; nothing is read from a checkpoint, and the
        others go on meanwhile. Where the rank may have died while an update was written, or a living one does not tell
        in its part of ``timeout``, no layer can be acquired here until an `update` succeeds to which this rank gives
        all of its shards. If it raises, the runtime is closed and nothing stays allocated.

        Args:
            revision: as the group's ranks gave it to `publish`.

        Raises:
            ConfigError: there is no layer.
            ExchangeError: no living rank holds what this rank needs; or their configs, layers or ``revision`` differ;
                or they are not published.
            StateError: a rank of this number is alive; or published before; or with ``assembly: tensor_list``, whose
                memory goes with the process that created it.
        """
        with self._ready_afterwards("rejoin"):
            self._membership.rejoin(timeout, revision)

    @contextmanager
    def _ready_afterwards(self, call: str) -> Iterator[None]:
        """The body gives this rank all the memory that it needs: then passes can begin."""
        self._lifecycle.require_setup(call)
        if not self._layers.in_order:
            raise ConfigError(f"{call} needs at least one layer")
        with self._closed_on_failure(), self._driver.current():
            yield
            with uninterrupted():
                self._schedule.start()
        self._last_layer = self._layers.in_order[-1].number
        self._lifecycle.publish()
        ready = len(self._layers.in_order)
        memory = tuple(nbytes >> 20 for nbytes in (self._assembly.resident_nbytes, self._assembly.staged_nbytes))
        _log.info("rank %d: %d layers ready, %d MiB resident, %d MiB staged", self.rank, ready, *memory)

    # -- what only owners write --------------------------------------------------------------------------------------
    def update(self, shards: Mapping[ShardKey, torch.Tensor], timeout: float = 60.0) -> None:
        """Write new experts into memory that this rank holds, with all ranks together, between passes.

        Every rank of the group calls it, each with what it has to change, which may be nothing. When it returns,
        every rank's next `acquire` gives the new bytes; until then every rank reads the old ones.

        Args:
            shards: by (layer, weight, owner), as `local_shard` takes them: a tensor of the shape and dtype that it
                returns. Where neighbours overlap, the owners of an expert must be given equal bytes.

        Raises:
            ConfigError: a key or a tensor does not fit, or one is missing that an update which did not end well may
                have begun to write; nothing was said to others.
            ExchangeError: a rank, which is named, did not come in time. If it says that nothing was written, the group
                is as it was. Otherwise a rank left midway, and no layer can be acquired until an `update` succeeds.
            StateError: a layer is acquired.
            DriverError: a call failed; where that was midway, as above.
        """
        with self._undisturbed():
            for key, value in shards.items():
                if not isinstance(key, tuple) or len(key) != 3:
                    raise ConfigError(f"update takes shards by (layer, weight, owner), not by {key!r}")
                layer, weight, owner = key
                self._membership.require_fits(self._layers.with_weight(layer, weight), weight, owner, value)
            self._membership.require_covers(shards)
            self._lifecycle.end_pass()  # so that the next acquire asks whether weights are whole
            with self._schedule.suspended():
                self._membership.update(shards, time.monotonic() + timeout)

    def check_integrity(self, *, verify: bool = False) -> None:
        """Check that what is mapped and what the slots hold is what the layouts say; meant for moments of idleness.

        With ``verify``, also that the bytes of every shard, this rank's and the others', are what its owner published,
        and that edges, slots and the resident cache have the same. That waits for the device, reads all shards, over
        the link where they are remote, and needs ``checksums: true`` in the config.

        Raises:
            StateError: something disagrees; the sentence says what.
            ConfigError: ``verify`` without ``checksums``.
        """
        with self._undisturbed():
            self._assembly.check_integrity()
            if verify:
                self._membership.verify()
            self._schedule.check_integrity(verify=verify)

    # -- a pass ------------------------------------------------------------------------------------------------------
    @between_regions
    def acquire(
        self,
        layer: int,
        *,
        mode: ModeSetting | None = None,
        tokens: int | None = None,
        top_k: int | None = None,
        chosen: torch.Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Weights:
        """The weights of ``layer``, with all experts, for the work given next to ``stream`` (default: the current one).

        Args:
            mode: ``"staged"``: ``stream`` waits until the remote experts are in the layer's slot. ``"in_place"``: the
                remote experts are read where they are; there is nothing to wait for, and the slots stay as they are, so
                that passes of both modes may alternate. ``"auto"``: what is faster for ``tokens``; the first layer
                decides for its pass, and in a graph for all its replays. Default: the config's.
            tokens: how many tokens the layer is given; for mode auto, and for `Stats.advice`.
            top_k: how many experts each of them uses: what mode auto goes by before it has timed passes.
            chosen: int64 ``[tokens, top_k]`` on the device, the experts that each token uses: what the resident cache
                goes by. ``stream`` counts them, if the layer is read in place.

        Returns:
            By weight, the tensor ``[E, ...]``: for each mode the same tensors, at the same addresses, on every call.
            They may be read by work given to ``stream`` until `release`; nobody may write to them. With ``assembly:
            tensor_list``, a list of tensors per weight, in expert order.

        Does not wait for the device. A staged layer that comes in another order than it was added is fetched now. While
        ``stream`` is captured into a graph a staged pass is captured whole and in order, from `acquire` of the first
        layer to `release` of the last; replays and other passes may then alternate.

        Raises:
            ConfigError: no such layer, the config does not provide for ``mode``, or mode auto is not told ``tokens``.
            StateError: the layer, or another that uses its slot, was acquired and not released; or not published; or a
                capture does not begin between passes; or ``stream`` is captured, and not the current one either, or
                another device's; or another thread is in the middle of a pass.
            DriverError: a copy could not be issued; the call may be repeated.
        """
        if self._lifecycle.runner == get_ident() and self._current_device() == self._index:
            return self._schedule.acquire(layer, mode, tokens, top_k, chosen, stream)
        self._lifecycle.require_running()
        self._membership.require_updated()
        begins = self._lifecycle.claim()
        try:
            with nullcontext() if self._driver.is_current() else self._driver.current():
                return self._schedule.acquire(layer, mode, tokens, top_k, chosen, stream)
        except BaseException:
            if begins:
                self._lifecycle.end_pass()
            raise

    @between_regions
    def release(self, layer: int, *, stream: torch.cuda.Stream | None = None) -> None:
        """All work that reads ``layer`` has been given to ``stream`` (default: the current one): fetch the next.

        Does not wait for the device.

        Raises:
            ConfigError: no such layer.
            StateError: the layer is not acquired, or was on the other side of a capture's border.
            DriverError: a call failed; `reset` makes the slots ready again.
        """
        if self._lifecycle.runner == get_ident() and self._current_device() == self._index:
            self._schedule.release(layer, stream)
        else:
            with self._undisturbed():
                self._schedule.release(layer, stream)
        if layer == self._last_layer:
            self._lifecycle.end_pass()

    def layer(
        self,
        layer: int,
        *,
        mode: ModeSetting | None = None,
        tokens: int | None = None,
        top_k: int | None = None,
        chosen: torch.Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> AbstractContextManager[Weights]:
        """`acquire` on entering, `release` on leaving, by an exception as well, which goes on whatever `release` says.

        A function that is to be compiled calls `acquire` and `release`: torch.compile ends a region at a call, but not
        in a ``with`` block, and would leave the function as it is. It is warned of.
        """
        if torch.compiler.is_compiling():
            warn_of_with()
        return self._held(layer, mode, tokens, top_k, chosen, stream)

    @contextmanager
    def _held(
        self,
        layer: int,
        mode: ModeSetting | None,
        tokens: int | None,
        top_k: int | None,
        chosen: torch.Tensor | None,
        stream: torch.cuda.Stream | None,
    ) -> Iterator[Weights]:
        weights = self.acquire(layer, mode=mode, tokens=tokens, top_k=top_k, chosen=chosen, stream=stream)
        try:
            yield weights
        except BaseException as error:
            undo_after(error, lambda: self.release(layer, stream=stream))
            raise
        self.release(layer, stream=stream)

    def reset(self, *, stream: torch.cuda.Stream | None = None) -> None:
        """Give up a pass that ended early: release what is acquired and refetch the first layers.

        Raises `StateError` if the current stream is captured, and `DriverError` if a call failed; it may be repeated.
        """
        with self._undisturbed():
            try:
                self._schedule.reset(stream)
            finally:
                self._lifecycle.end_pass()  # so that another thread may repeat it, too

    def refresh_cache(self) -> None:
        """Keep copies of the remote experts on this GPU to which `acquire` was told that most tokens were routed.

        To be called between passes, and between replays of graphs, now and then. Waits for the device; other ranks
        take no part. Afterwards the same tensors, at the same addresses, have the same bytes; of some, other memory is
        read. What was counted before the last refresh counts half, so that the cache follows the routing.

        Raises:
            ConfigError: the config has no ``resident_cache``.
            StateError: a layer is acquired in place, or a stream is being captured into a graph.
            DriverError: a call failed; the cache holds less than it could, and all goes on. Where undoing failed too,
                no layer is read in place until another call succeeds.
        """
        with self._undisturbed():
            self._membership.require_updated()
            self._schedule.refresh_cache()

    def tensor_list(self, layer: int, weight: str) -> list[torch.Tensor]:
        """The same bytes as `acquire` returned, as at most three contiguous tensors ``[E_i, ...]`` in expert order: the
        experts before this rank's own, its own, and those after. Valid between `acquire` and `release`.

        Raises:
            ConfigError: no such layer or weight.
            StateError: the layer is not acquired.
        """
        with self._undisturbed():
            self._layers.with_weight(layer, weight)
            return self._schedule.tensor_list(layer, weight)

    # -- what it tells -----------------------------------------------------------------------------------------------
    def stats(self) -> Stats:
        """Bytes, hits, misses and waits since publish, after `close` as well. Does not wait for the device.

        Any thread may ask at any moment. Waits are read off the device by the thread that runs passes alone, so another
        thread sees those up to the latest pass that was timed.
        """
        own = self._lifecycle.latest_runner == get_ident() and self._lifecycle.is_running
        with self._driver.current() if own else nullcontext():
            return self._schedule.stats(read=own)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record what this rank copies, reads and waits for while the body runs.

        The trace is filled when the body ends, which waits for the device. Times are the device's own; they cost an
        event record for each acquire, release and copy stream, so a trace may span many passes. On a GPU, each layer
        is also an NVTX range from acquire to release. Replays of CUDA graphs are not seen. Meanwhile the calling thread
        of `release` gives the copies to the driver itself, which takes it milliseconds a layer if they are slices.

        Raises:
            StateError: not published, nothing is staged, or a trace is being recorded already.
        """
        trace = Trace(self.rank, time.time())
        with self._undisturbed():
            tracer = self._schedule.start_trace()
        error: BaseException | None = None
        try:
            tracer.recording = True
            yield trace
        except BaseException as raised:
            error = raised
            raise
        finally:
            tracer.recording = False  # so that another trace may begin, whatever comes now
            undo_after(error, lambda: self._finish_trace(trace))

    def _finish_trace(self, trace: Trace) -> None:
        if self._lifecycle.is_running:  # a trace that outlives the runtime stays empty
            with self._driver.current():
                trace.spans += self._schedule.finish_trace()

    def peers(self, timeout: float = 5.0) -> dict[int, bool]:
        """For every other rank, whether it answers within ``timeout`` seconds; one that has left is not waited for."""
        self._lifecycle.require_running()
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
        failures = Failures()
        for need_no_device in self._membership.leave, self._schedule.stop:
            with failures.noted():
                need_no_device()
        with failures.noted(), self._driver.current():
            self._driver.synchronize()
            for free in (self._schedule.close, self._membership.close, self._assembly.close):
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

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Once published: the device is current while the body runs, and no other thread is in a pass."""
        self._lifecycle.require_running()
        with self._driver.current(), self._lifecycle.undisturbed():
            yield


_open: WeakSet[DWDPRuntime] = WeakSet()


def _after_fork() -> None:
    """A child has none of the threads, and what it has of sockets and locks is not to keep others waiting."""
    for runtime in _open:
        runtime._lifecycle.fork()
        runtime._membership.forget()


os.register_at_fork(after_in_child=_after_fork)
