"""The runtime that a model runner imports: from shapes to tensors in which every expert is at its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from vmm_dwdp.allocator.handles import undo_after
from vmm_dwdp.config import ModeSetting
from vmm_dwdp.memory.assembly import Weights
from vmm_dwdp.observe.stats import BankCounts, Stats
from vmm_dwdp.observe.trace import Trace
from vmm_dwdp.schedule.compiled_models import between_regions, warn_of_with
from vmm_dwdp.schedule.given_stream import StreamLike, given_stream
from vmm_dwdp.schedule.hit_path import HitPath, this_thread
from vmm_dwdp.schedule.in_place import LookedUp
from vmm_dwdp.schedule.stated import Stated
from vmm_dwdp.together import Together


class DWDPRuntime(Together):
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
            it is missing. Or a process group of the ranks, all on one host. Or a `TCPRendezvous`, for ranks on several.
        driver: an open driver of ``device`` to use instead of a new one, for example a host driver with small pages.

    Attributes:
        config: as it was given.
        rank: as it was given.
        ledger: what is open; all zeros after `close`.

    Raises:
        ConfigError: there is no such rank, or the machine lacks what the config asks for.
        ExchangeError: the rendezvous directory is not private, or the ranks of the process group are on several hosts.
        DriverError: the device cannot be used.
    """

    _hit_path: HitPath | None = None

    def _begin(self) -> None:
        calls = type(self).acquire, type(self).release
        layers = self._schedule.hittable
        if layers and calls == (DWDPRuntime.acquire, DWDPRuntime.release):  # no subclass has to be asked
            self._hit_path = HitPath(self._lifecycle, self._driver, self._driver.native_calls, self, *calls)
            vars(self).update(self._hit_path.open(layers))  # see [Note: The hit path]

    def _end(self) -> None:
        if self._hit_path is not None:
            for name in "acquire", "release":
                vars(self).pop(name, None)
            self._hit_path.close()

    # -- a pass ------------------------------------------------------------------------------------------------------
    def forward_pass(
        self, *, mode: ModeSetting | None = None, tokens: int | None = None, top_k: int | None = None
    ) -> AbstractContextManager[None]:
        """A block for one pass, or several: what is of the pass is stated once, and nothing of it is left over.

            with runtime.forward_pass(tokens=len(x)):
                for number in layers:
                    weights = runtime.acquire(number)
                    ...
                    runtime.release(number)

        Threads take turns: who comes to such a block while another thread is in one waits for it, so passes may begin
        in any thread, and each has the layers to itself. Where the body raises, the pass is given up as by `reset`; so
        it is, in silence, where it ends before the last layer.

        Args:
            mode: as `acquire` takes it, for every layer that is not told otherwise.
            tokens: likewise.
            top_k: likewise.

        Raises:
            ConfigError: the config does not provide for ``mode``.
            StateError: not published; or within such a block of this thread; or a layer is acquired, at the beginning
                or at the end; or another thread is in a pass outside of such a block.
        """
        if torch.compiler.is_compiling():
            warn_of_with("runtime.forward_pass(...)", "let it stand around the call of what is compiled")
        return self._in_turn(Stated(mode, tokens, top_k))

    @contextmanager
    def _in_turn(self, stated: Stated) -> Iterator[None]:
        self._lifecycle.require_idle()
        with self._lifecycle.turn():
            self._lifecycle.require_idle()  # still, after waiting for others
            with self._lifecycle.undisturbed() as begins:
                self._membership.require_updated()
                if stated.mode is not None:
                    self._schedule.require_mode(stated.mode)
                self._driver.is_current()  # which a thread without a device needs to have been asked
                self._require_released()
                if not begins:
                    self._give_up()
                self._lifecycle.claim(goes_on=True)
                yield from self._stating(stated)

    def _stating(self, stated: Stated) -> Iterator[None]:
        self._schedule.stated = stated
        try:
            yield
            if self._lifecycle.is_running:
                self._require_released()
        except BaseException as error:
            undo_after(error, self._give_up)
            raise
        finally:
            self._schedule.stated = None
        self._give_up()

    def _give_up(self) -> None:
        """Give up the pass that this thread is in the middle of, if it is."""
        if self.published and not self.asleep and self._lifecycle.in_pass:
            with self._driver.current():
                self._schedule.reset(None)
            self._lifecycle.end_pass()

    @between_regions
    def acquire(
        self,
        layer: int,
        *,
        mode: ModeSetting | None = None,
        tokens: int | None = None,
        top_k: int | None = None,
        chosen: torch.Tensor | None = None,
        stream: StreamLike | None = None,
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
                goes by. ``stream`` counts them, if the layer is read in place, after the current one has made them.
            stream: torch's, the number that the driver knows it by, or any object with ``__cuda_stream__``.

        Returns:
            By weight, the tensor ``[E, ...]``: for each mode the same tensors, at the same addresses, on every call.
            They may be read by work given to ``stream`` until `release`; nobody may write to them. With ``assembly:
            tensor_list``, a list of tensors per weight, in expert order.

        Does not wait for the device. A staged layer that comes in another order than it was added is fetched now. While
        ``stream`` is captured into a graph a staged pass is captured whole and in order, from `acquire` of the first
        layer to `release` of the last; replays and other passes may then alternate.

        Raises:
            ConfigError: no such layer or stream, the config does not provide for ``mode``, or mode auto is not told
                ``tokens``.
            StateError: the layer, or another that uses its slot, was acquired and not released; or not published; or a
                capture does not begin between passes; or ``stream`` is captured, and not the current one either, or
                another device's; or another thread is in the middle of a pass.
            DriverError: a copy could not be issued; the call may be repeated.
        """
        lifecycle = self._lifecycle
        this = this_thread()
        with lifecycle.calls:
            if lifecycle.runner == this and self._current_device() == self._index:
                was_in_pass, lifecycle.in_pass = lifecycle.in_pass, True  # see [Note: One thread at a time]
                if lifecycle.runner == this:
                    try:
                        return self._schedule.acquire(layer, mode, tokens, top_k, chosen, stream)
                    except BaseException:
                        lifecycle.in_pass = was_in_pass
                        raise
            lifecycle.require_idle()
            self._membership.require_updated()
            begins = lifecycle.claim(goes_on=True)
            try:
                with nullcontext() if self._driver.is_current() else self._driver.current():
                    return self._schedule.acquire(layer, mode, tokens, top_k, chosen, stream)
            except BaseException:
                if begins:
                    lifecycle.end_pass()
                raise

    @between_regions
    def look_up(self, layer: int, chosen: torch.Tensor, *, stream: StreamLike | None = None) -> LookedUp:
        """Where the experts that tokens chose are to be read: in the bank, if there is one and they are in it.

        To be called once between `acquire` and `release` of ``layer``, in any mode, eager or captured. With an
        ``expert_bank`` the device works out which experts come into it, and copies them; nothing waits. With
        ``movable_experts`` rows are those of `logical_to_physical`; else, without a bank, experts.

        Args:
            chosen: int32 or int64 ``[tokens, top_k]`` on the device, as the current stream makes it; what is no expert
                is given row -1.
            stream: the one that reads the layer; as `acquire` takes it.

        Raises:
            ConfigError: ``chosen`` cannot be, or a token chooses more experts than the bank has rows.
            StateError: the layer is not acquired, or was looked up since.
        """
        with self._lifecycle.calls, self._undisturbed():
            return self._schedule.look_up(layer, chosen, stream)

    @between_regions
    def release(self, layer: int, *, stream: StreamLike | None = None) -> None:
        """All work that reads ``layer`` has been given to ``stream`` (default: the current one): fetch the next.

        Does not wait for the device.

        Raises:
            ConfigError: no such layer.
            StateError: the layer is not acquired, or was on the other side of a capture's border.
            DriverError: a call failed; `reset` makes the slots ready again.
        """
        lifecycle = self._lifecycle
        with lifecycle.calls:
            if lifecycle.runner == this_thread() and self._current_device() == self._index:
                self._schedule.release(layer, stream)
            else:
                with self._undisturbed():
                    self._schedule.release(layer, stream)
            if layer == self._last_layer:
                lifecycle.in_pass = False

    def layer(
        self,
        layer: int,
        *,
        mode: ModeSetting | None = None,
        tokens: int | None = None,
        top_k: int | None = None,
        chosen: torch.Tensor | None = None,
        stream: StreamLike | None = None,
    ) -> AbstractContextManager[Weights]:
        """`acquire` on entering, `release` on leaving, by an exception as well, which goes on whatever `release` says.

        A function that is to be compiled calls `acquire` and `release`: torch.compile ends a region at a call, but not
        in a ``with`` block, and would leave the function as it is. It is warned of.
        """
        if torch.compiler.is_compiling():
            warn_of_with("runtime.layer(...)", "call acquire and release there")
        return self._held(layer, mode, tokens, top_k, chosen, stream)

    @contextmanager
    def _held(
        self,
        layer: int,
        mode: ModeSetting | None,
        tokens: int | None,
        top_k: int | None,
        chosen: torch.Tensor | None,
        stream: StreamLike | None,
    ) -> Iterator[Weights]:
        weights = self.acquire(layer, mode=mode, tokens=tokens, top_k=top_k, chosen=chosen, stream=stream)
        try:
            yield weights
        except BaseException as error:
            undo_after(error, lambda: self.release(layer, stream=stream))
            raise
        self.release(layer, stream=stream)

    @contextmanager
    def exchange(self, layer: int, *, stream: StreamLike | None = None) -> Iterator[None]:
        """A block for what a rank says to ranks of other nodes for ``layer``: its wait for them is named.

            with runtime.exchange(layer):
                dispatched = rail.dispatch(hidden, chosen, weights, num_experts)

        What ``stream`` (default: the current one) takes for it is timed: in `LayerStats.node_wait_s`, in a trace, and
        in `Stats.node_advice` where a quarter of a pass and more are such waits. What is captured is not seen.

        Raises:
            ConfigError: no such layer or stream.
            StateError: not published, or another thread is in the middle of a pass.
            DriverError: a call failed.
        """
        with self._lifecycle.calls, self._undisturbed():
            number, at = self._layers.numbered[layer].number, given_stream(stream, self._driver)
            begins = self._exchanges.begin(number, at)
        try:
            yield
        except BaseException:
            self._exchanges.abandon(begins)
            raise
        with self._lifecycle.calls, self._undisturbed():
            self._exchanges.end(number, begins, at)

    def reset(self, *, stream: StreamLike | None = None) -> None:
        """Give up a pass that ended early: release what is acquired and refetch the first layers.

        Raises `StateError` if the current stream is captured, and `DriverError` if a call failed; it may be repeated.
        """
        with self._lifecycle.calls, self._undisturbed():
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
        own = self._lifecycle.latest_runner == this_thread() and self._lifecycle.is_running
        with self._driver.current() if own else nullcontext():
            if own:
                self._exchanges.read()
            return self._exchanges.added_to(self._schedule.stats(read=own))

    def bank_counts(self) -> dict[int, BankCounts]:
        """By layer number, uses, hits and copies of its bank; empty without one. Waits for the current stream."""
        with self._undisturbed():
            return {} if self._assembly.bank is None else self._assembly.bank.counts()

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
        with self._lifecycle.calls, self._undisturbed():
            tracer = self._schedule.start_trace()
        error: BaseException | None = None
        try:
            tracer.recording, self._exchanges.tracer = True, tracer
            yield trace
        except BaseException as raised:
            error = raised
            raise
        finally:
            # Whatever comes now, another trace may begin.
            tracer.recording, self._exchanges.tracer = False, None
            undo_after(error, lambda: self._finish_trace(trace))

    def _finish_trace(self, trace: Trace) -> None:
        with self._lifecycle.calls, self._driver.current():
            if self._lifecycle.is_running:  # a trace that outlives the runtime stays empty
                trace.spans += self._schedule.finish_trace()
