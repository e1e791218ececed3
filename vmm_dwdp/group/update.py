"""What a rank writes while the group changes its weights, and what an update that did not end well may have left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from vmm_dwdp.allocator.driver import Driver
from vmm_dwdp.errors import ConfigError, StateError
from vmm_dwdp.layout.expert_order import ExpertOrder
from vmm_dwdp.layout.layer import Layer, Layers
from vmm_dwdp.layout.placement import HOST, Owner, in_words
from vmm_dwdp.memory.assembly import Assembly

ShardKey = tuple[int, str, Owner]  # layer number, weight, whose


class Shards:
    """The shards that a rank holds, as something that updates write.

    Args:
        held: the owners whose memory this rank creates.
        layers: what was added so far, by the caller.

    Attributes:
        begun: what may have been written by an update that did not end well.
    """

    def __init__(self, driver: Driver, assembly: Assembly, held: Collection[Owner], layers: Layers) -> None:
        self.begun: set[ShardKey] = set()
        self._driver = driver
        self._assembly = assembly
        self._held = held
        self._layers = layers

    def held(self) -> Iterator[ShardKey]:
        """The keys of all that this rank holds."""
        for layer in self._layers.in_order:
            for weight in layer.weights:
                for owner in self._held:
                    yield layer.number, weight, owner

    def experts(self, layer: Layer, owner: Owner) -> Sequence[int]:
        """What is in the shard of ``owner`` now, by row."""
        return self._assembly.tables.order.held(layer, owner)

    def begin_moving(self, order: ExpertOrder) -> None:
        """What this rank holds of layers that are to have another ``order`` may be written from now on."""
        before = self._assembly.tables.order
        changed = [
            layer.number for layer in self._layers.in_order if [*before.rows_of(layer)] != [*order.rows_of(layer)]
        ]
        self.begun.update(key for key in self.held() if key[0] in changed and key[2] != HOST)

    def require_held(self, owner: Owner) -> None:
        """Raise `ConfigError` unless this rank creates the memory of ``owner``."""
        if owner not in self._held:
            raise ConfigError(f"this rank does not hold the shards of {in_words(owner)}")

    def require_fits(
        self, layer: Layer, weight: str, owner: Owner, value: torch.Tensor, experts: range | None = None
    ) -> None:
        """Raise `ConfigError` unless ``value`` can be written to ``experts`` of the shard of ``owner``; by default to
        all that it holds."""
        self.require_held(owner)
        where = f"layer {layer.number}, {weight}"
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{where}: a shard is a tensor, not {type(value).__name__}")
        held = self.experts(layer, owner)
        whose = f"the shard of {in_words(owner)}"
        if experts is None:
            if not isinstance(held, range):
                raise ConfigError(
                    f"{where}: experts of this layer have moved, and a whole shard has no order of its own any more: "
                    "write experts by their numbers in a block of runtime.updating(), as runtime.held_experts tells"
                )
            experts = held
        elif experts.step != 1 or not (set(experts) <= set(held)):
            raise ConfigError(f"{where}: {whose} has the experts {held}, not {experts}")
        else:
            whose = f"the part of {experts} of {whose}"
        spec = layer.weights[weight]
        shape = spec.of(len(experts))
        if tuple(value.shape) != shape or value.dtype != spec.dtype:
            found, stated = f"{tuple(value.shape)} of {value.dtype}", f"{shape} of {spec.dtype}"
            raise ConfigError(f"{where}: {whose} is {stated}, not {found}")

    def require_covered(self, unfinished: Collection[ShardKey], whole: Collection[ShardKey]) -> None:
        """Raise `ConfigError` unless ``whole`` has all that is ``unfinished``."""
        for key in self.held():
            if key in unfinished and key not in whole:
                number, weight, owner = key
                raise ConfigError(
                    f"layer {number}, {weight}: the shard of {in_words(owner)} may be half written by an update that "
                    "was not finished; the next one must have it"
                )

    def write(self, layer: Layer, weight: str, owner: Owner, value: torch.Tensor, experts: range) -> None:
        """While no rank reads. The bytes are there when it returns."""
        self.begun.add((layer.number, weight, owner))
        held = self.experts(layer, owner)
        with self._assembly.writing(layer, weight, owner) as shard:
            if isinstance(held, range):
                first = experts.start - held.start
                shard[first : first + len(experts)].copy_(value)
            else:
                for expert, each in zip(experts, value, strict=True):
                    shard[held.index(expert)].copy_(each)
            self._driver.synchronize()


class Update:
    """What `DWDPRuntime.updating` gives: new experts, one tensor after another. Of use while its block runs."""

    def __init__(
        self, assembly: Assembly, shards: Shards, rank: int, layers: Layers, unfinished: Collection[ShardKey]
    ) -> None:
        """``unfinished``: what has to be written whole."""
        self._assembly = assembly
        self._shards = shards
        self._rank = rank
        self._layers = layers
        self._unfinished = unfinished
        self._written: dict[ShardKey, set[int]] = {}  # which experts
        self._is_over = False

    def write(
        self,
        layer: int,
        weight: str,
        value: torch.Tensor,
        *,
        experts: range | int | None = None,
        owner: Owner | None = None,
    ) -> None:
        """Write experts of a weight that this rank holds. Any thread may, and again what was written before.

        Args:
            value: ``[n, ...]``, of the weight's dtype, on any device; nothing refers to it afterwards.
            experts: which, of those that `DWDPRuntime.held_experts` tells, by the numbers of the model: ``n`` one
                after another, or one, of which ``value`` is ``[...]`` or ``[1, ...]``. Default: all of them, as
                long as `rebalance` has moved none of the layer.
            owner: whose shard, as `DWDPRuntime.local_shard` takes it; default: this rank's own.

        Raises:
            ConfigError: there is no such shard here, or ``value`` does not fit. Nothing was written.
            StateError: the update is over.
            DriverError: a call failed.
        """
        found = self._layers.with_weight(layer, weight)
        owner = self._rank if owner is None else owner
        if isinstance(experts, int):
            experts = range(experts, experts + 1)
            if isinstance(value, torch.Tensor) and value.dim() == len(found.weights[weight].shape) - 1:
                value = value[None]
        self._shards.require_fits(found, weight, owner, value, experts)
        experts = found.placement.experts(owner) if experts is None else experts
        with self._assembly.touching():
            if self._is_over:
                raise StateError("the update is over: write in the block of runtime.updating()")
            self._shards.write(found, weight, owner, value, experts)
            self._written.setdefault((layer, weight, owner), set()).update(experts)

    def end(self) -> None:
        """The body is over."""
        self._is_over = True

    def require_whole(self) -> None:
        """Raise `ConfigError` if something may be half written still."""
        whole = [
            (number, weight, owner)
            for number, weight, owner in self._unfinished
            if self._written.get((number, weight, owner), set())
            >= set(self._shards.experts(self._layers.numbered[number], owner))
        ]
        self._shards.require_covered(self._unfinished, whole)
