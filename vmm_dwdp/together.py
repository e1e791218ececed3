"""What the ranks of a published group do together or not at all: new weights, experts that change places, and memory
given back and taken again."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.group.update import ShardKey, Update
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.placement import Owner
from vmm_dwdp.rank import Rank


class Together(Rank):
    """A rank that can update, rebalance, sleep and wake, with all others."""

    # -- new weights -------------------------------------------------------------------------------------------------
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
            held = self._membership.shards
            for key, value in shards.items():
                if not isinstance(key, tuple) or len(key) != 3:
                    raise ConfigError(f"update takes shards by (layer, weight, owner), not by {key!r}")
                layer, weight, owner = key
                held.require_fits(self._layers.with_weight(layer, weight), weight, owner, value)
            held.require_covered(self._membership.unfinished(), shards)
            with self._updating(timeout) as update:
                for (layer, weight, owner), value in shards.items():
                    update.write(layer, weight, value, owner=owner)

    @contextmanager
    def updating(self, timeout: float = 60.0) -> Iterator[Update]:
        """`update` by one tensor after another, so that nobody needs memory for all of them.

            with runtime.updating() as update:
                for layer, weight, expert, tensor in stream:
                    update.write(layer, weight, tensor, experts=expert)

        Every rank of the group enters such a block, or calls `update`. Before the body runs, all have come, and none
        reads; after it all have written, and every rank's next `acquire` gives the new bytes. What is not written keeps
        its bytes. In the body this runtime has no pass and no other call, except `stats`, `peers` and `close`.

        Args:
            timeout: seconds to wait for the other ranks, before the body and again after it: for the longest body.

        Raises as `update` does. If the body raises, the update has not ended well, and that is what is raised; the
        next one has to write whatever this one may have begun to, each such shard whole.
        """
        self._lifecycle.require_idle()
        with self._lifecycle.undisturbed(), self._updating(timeout) as update:
            yield update

    @contextmanager
    def _updating(self, timeout: float, moved: ExpertOrder | None = None) -> Iterator[Update]:
        self._lifecycle.ask_again()  # so that the next acquire asks whether weights are whole
        with (
            self._schedule.suspended(),
            self._lifecycle.busy("an update"),
            self._membership.updating(timeout, moved) as update,
        ):
            yield update

    # -- experts that change places ----------------------------------------------------------------------------------
    def logical_to_physical(self, layer: int) -> torch.Tensor:
        """int64 ``[E]`` on the device: the row of each expert in what `acquire` returns. The caller must not write it.

            rows = runtime.logical_to_physical(layer)  # once
            experts(hidden, rows[chosen], weights)     # in every pass, captured into a graph or not

        The same tensor at every call; `rebalance` changes what is in it, so that graphs that were captured before
        follow. Expert ``e`` is in row ``e`` until then.

        Raises:
            ConfigError: no such layer, or the config has no ``movable_experts``.
            StateError: closed; or the first call for a layer comes while a stream is captured.
        """
        described = self._layers.numbered[layer]
        self._require_movable()
        if self.closed:
            raise StateError("the runtime is closed")
        with self._driver.current():
            return self._assembly.tables.table(described)

    def held_experts(self, layer: int, owner: Owner | None = None) -> tuple[int, ...]:
        """The experts that this rank, or ``owner``, holds of ``layer`` now, by row: what `local_experts` tells, until
        `rebalance` moves some. Raises `ConfigError` if there is no such, and before `publish` as `local_experts` does.
        """
        described = self._layers.numbered[layer]
        if not self._assembly.tables.order.is_moved(described):
            return tuple(self.local_experts(layer, owner))
        return tuple(self._membership.shards.experts(described, self.rank if owner is None else owner))

    def rebalance(self, *, most: int = 8, timeout: float = 60.0) -> int:
        """Move experts between ranks so that their links are evenly used, with all ranks together, between passes.

        Every rank of the group calls it, now and then. They go by how their tokens were routed since it last succeeded:
        what `acquire` was told as ``chosen`` of layers that were read in place. Pairs of experts of a layer change
        places, where the owner from which others read most is relieved by it; addresses, captured graphs and tensors
        stay, and `logical_to_physical` changes. Waits for the device. Takes memory for as many experts as come to this
        rank, until it returns.

        Args:
            most: pairs that change places, of all layers; the least that any rank states. It bounds how long it takes.
            timeout: seconds that this rank waits for the others to come, and again for them to have written.

        Returns:
            How many experts have moved, of all layers: 0 where no swap would relieve a layer's busiest owner by a
            hundredth of what is read of it.

        Raises:
            ConfigError: the config has no ``movable_experts``, or ``most`` is not a whole number of at least 0.
            ExchangeError: a rank, which is named, did not come in time. If it says that nothing was written, all is as
                it was. Otherwise a rank left midway, and no layer can be acquired until an `updating` succeeds in which
                the experts of layers that were being moved are written.
            StateError: a layer is acquired, a stream is captured, or nobody has asked for the `logical_to_physical` of
                a layer: whoever computes would use the wrong experts.
            DriverError: a call failed; where that was midway, as above.
        """
        self._lifecycle.require_idle()
        self._require_movable()
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ConfigError(f"rebalance takes a whole number of swaps, not {reprlib.repr(most)}")
        with self._undisturbed():
            self._membership.require_updated()
            self._assembly.tables.require_asked()
            self._require_released()
            counting = self._schedule.in_place
            assert counting is not None, "movable experts need a mode that reads in place"
            moves = self._membership.agree_on_moves(counting.routed(), most, timeout)
            if moves.moved:
                with self._updating(timeout, moves.order) as update:
                    for layer, weight, expert, value in moves.arriving:
                        update.write(layer, weight, value, experts=expert)
            counting.rebalanced()
        return moves.moved

    def _require_movable(self) -> None:
        if not self.config.movable_experts:
            raise ConfigError("experts stay where they are: the config has no movable_experts")

    def _require_released(self) -> None:
        with self._driver.current():
            held = self._schedule.held
        if held is not None:
            raise StateError(f"layer {held} was acquired, and was not released")

    # -- memory for others -------------------------------------------------------------------------------------------
    @property
    def asleep(self) -> bool:
        """Whether the memory of this rank is given back: see `sleep`."""
        return self._lifecycle.is_asleep

    def sleep(self, *, keep: bool = True, timeout: float = 60.0) -> None:
        """Give back the device's memory, with all ranks together, between passes, until `wake`.

        Every rank of the group calls it, with the same ``keep``. What others have mapped of a rank's memory goes too:
        when it returns, every rank's shards, slots and resident cache have left the device. Addresses stay reserved,
        so that tensors and captured graphs are right again after `wake`; meanwhile nothing may read them, and replays
        would fail. The pool of host memory stays. Called while asleep, it is an agreement that changes nothing; with
        ``keep=False`` it gives up what was kept.

        Args:
            keep: the bytes are copied to host memory, as many as `memory_needed().resident`, which is taken by the
                first call and stays until `close`, as taking it is most of the time. Otherwise they are lost, and after
                `wake` no layer can be acquired until an `update` has given all ranks' shards.
            timeout: seconds that this rank waits for the others, once its own bytes are copied.

        Raises:
            ExchangeError: a rank, which is named, did not come in time, or another did something else. If it says that
                nothing was given back, the group is as it was. Otherwise this rank sleeps if `asleep` says so, and what
                others have not let go of is still taken: `wake`, or `sleep` again, on all ranks.
            StateError: a layer is acquired, a stream is captured, or with ``assembly: tensor_list``.
            DriverError: a call failed, host memory could not be had for example; as above.
        """
        with self._moving():
            self._membership.sleep(keep, timeout)

    def wake(self, *, timeout: float = 60.0) -> None:
        """Take the memory again that `sleep` gave back, at the same addresses, with all ranks together.

        Own shards come back from host memory, the others' are mapped anew, read-only, and slots and resident cache are
        filled. Called while awake, it changes nothing, but every rank has to call it.

        Args:
            timeout: seconds that this rank waits for the others, once it has its memory.

        Raises:
            ExchangeError: a rank, which is named, did not come in time. This rank sleeps on, without memory, if it
                slept before; one that died comes back by `rejoin`, and wakes with the others.
            DriverError: there is no memory, and the message says how much is free; this rank sleeps on. Where a copy
                into a slot was refused, it is awake: `reset`.
            ConfigError: the resident cache does not fit beside the rest; this rank sleeps on.
            StateError: as with `sleep`.
        """
        with self._moving(), self._told_of_room():
            self._membership.wake(timeout)
            if not self._schedule.is_started:  # it came back while the group slept
                with self._closed_on_failure():
                    self._start()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Nothing reads or copies while the body runs; afterwards slots and cache are filled anew, unless asleep."""
        self._lifecycle.require_published()
        self._lifecycle.require_not_busy()
        self._assembly.require_can_sleep()
        with self._driver.current(), self._lifecycle.undisturbed():
            self._lifecycle.ask_again()  # so that the next acquire asks whether it may
            with self._schedule.suspended(lambda: not self.asleep):
                yield
