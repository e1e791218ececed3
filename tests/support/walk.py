"""A random walk over everything that a group can be told, judged by what the documentation says, and by nothing else.

One seed is one walk: the config, the layers, the steps and their bytes. A model of the group is kept: which ranks are
there, what is acquired, which bytes every layer has. What a call returns or refuses is compared with it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, Final

from support.ranks import Bytes, InProcess, Outcome, digest
from support.walked_group import Rank, WalkedGroup, Wrong
from vmm_dwdp import HOST, ExpertPlacement

SOON: Final = 0.25  # seconds: how long is waited for a rank that does not come
LATE: Final = 30.0  # seconds: for one that does
REFUSED: Final = {"ConfigError", "StateError", "ExchangeError", "DriverError"}


class Walk(WalkedGroup):
    """From set-up to close."""

    # -- the walk ------------------------------------------------------------------------------------------------------
    def run(self, steps: int) -> None:
        """Raises `Wrong`, with the steps so far."""
        with tempfile.TemporaryDirectory() as directory:
            self.directory = directory
            self.ranks = [self._enter(number) for number in range(self.config.group_size)]
            try:
                self._set_up()
                for _ in range(steps):
                    self._step()
                self._end()
            except Wrong as wrong:
                raise Wrong(f"{wrong}\n{self}") from None
            finally:
                for rank in self.ranks:
                    self._abandon(rank)

    def _set_up(self) -> None:
        for rank in self.ranks:
            self._done(rank, "make")
            if self.chance.random() < 0.2:
                self._must(self.tell(rank, "call", "publish", timeout=SOON), "ConfigError")  # it has no layer
            for number in self.numbers:
                self._done(rank, "add_layer", number)
            for _ in range(self.chance.choice([0, 0, 2])):
                self._early(rank)
        filling = [self._begin(rank, "fill", self.model) for rank in self.ranks]  # for which they may settle first
        for rank, filled in zip(self.ranks, filling, strict=True):
            self._must(filled(), "done")
            held = ExpertPlacement(self._experts, self.placed).experts(rank.number)
            if self._done(rank, "call", "local_experts", self.numbers[0]) != held:
                raise Wrong(f"the rank does not hold {held}")
        publishing = [self._begin(rank, "call", "publish", timeout=LATE) for rank in self.ranks]
        for rank, published in zip(self.ranks, publishing, strict=True):
            self._must(published(), "done")
            rank.state = "running"

    def _early(self, rank: Rank) -> None:
        """A call that comes too early, or has an argument that cannot be."""
        what = self.chance.choice(["call", "set up", "stats"])
        if what == "stats":
            if self._done(rank, "stats") != (0, 0):
                raise Wrong("something was counted before publish")
        elif what == "call":
            self._must(self._refused_call(rank), "StateError")
        else:
            bad = ["add again", "no layer", "no weight", "no owner", "owner in words", "no experts", "nobody's experts"]
            self._must(self.tell(rank, "bad_set_up", self.chance.choice(bad)), "ConfigError")

    def _refused_call(self, rank: Rank) -> Outcome:
        """Any call that needs a published runtime."""
        layer = self.chance.choice(self.numbers)
        calls: list[tuple[Any, ...]] = [
            ("acquire", layer),
            ("release", layer),
            ("call", "reset"),
            ("update", {}, None, SOON),
            ("call", "refresh_cache"),
            ("call", "check_integrity"),
            ("tensor_list", layer, "w0"),
            ("traced", [], False),
            ("call", "peers", 0.1),
        ]
        if self.config.movable_experts:
            calls.append(("rebalance", 3, SOON))
        if rank.state != "set-up":
            calls += [
                ("shard_late",),
                ("add_layer", 77) if 77 in self.layers else ("call", "publish"),
                ("call", "rejoin"),
            ]
        return self.tell(rank, *self.chance.choice(calls))

    def _step(self) -> None:
        rank = self.chance.choice(self.ranks)
        if rank.state == "closed":
            self._after_close(rank)
            return
        if rank.state == "dead":
            if self.chance.random() < 0.3:
                self._return(rank)
            return
        steps: dict[Callable[[Rank], None], int] = {
            self._pass: 30,
            self._stated_pass: 6,
            self._look_up: 8,
            self._acquire: 20,
            self._release: 12,
            self._reset: 4,
            self._update: 5,
            self._missed_update: 1,
            self._bad_update: 2,
            self._rebalance: 2 + 8 * self.config.movable_experts,
            self._sleep: 2,
            self._refresh: 6,
            self._integrity: 5,
            self._tensor_list: 3,
            self._stats: 3,
            self._trace: 2,
            self._peers: 2,
            self._too_late: 2,
            self._abandoned: 2,
            self._impostor: 1,
            self._close: 1,
            self._death: 2 * self.processes,
        }
        self.chance.choices(list(steps), list(steps.values()))[0](rank)

    # -- between passes ------------------------------------------------------------------------------------------------
    def _refresh(self, rank: Rank) -> None:
        outcome = self.tell(rank, "call", "refresh_cache")
        held = set(rank.acquired.values())
        if not self.config.resident_cache:
            kinds = {"ConfigError"}
        elif "in_place" in held:
            kinds = {"StateError"}
        else:
            kinds = {"done", "StateError"} if "auto" in held else {"done"}
        self._must(outcome, *kinds, *(["StateError"] if rank.barred else []))

    def _integrity(self, rank: Rank) -> None:
        if rank.acquired or rank.barred:
            return
        verify = self.chance.random() < 0.5
        outcome = self.tell(rank, "call", "check_integrity", verify=verify)
        self._must(outcome, "done" if self.config.checksums or not verify else "ConfigError")

    def _tensor_list(self, rank: Rank) -> None:
        """Valid between acquire and release; of no interest otherwise, unless there is no such."""
        layer, name = self.chance.choice([*self._weights(), (99, "w0"), (self.numbers[0], "no such")])
        outcome = self.tell(rank, "tensor_list", layer, name)
        if (layer, name) not in self.model:
            self._must(outcome, "ConfigError", *(["StateError"] if rank.barred else []))
        elif rank.acquired.get(layer) == "staged":
            found = self._must(outcome, "done")
            if not any(found == digest(model[layer, name]) for model in self.candidates):
                raise Wrong(f"tensor_list of layer {layer} has other bytes than the model")
        elif outcome.kind == "done" and layer in rank.acquired:
            if not any(outcome.told == digest(model[layer, name]) for model in self.candidates):
                raise Wrong(f"tensor_list of layer {layer}, acquired {rank.acquired[layer]}, has other bytes")
        else:
            self._must(outcome, "done", "StateError")

    def _stats(self, rank: Rank) -> None:
        counted, _ = self._done(rank, "stats")
        if counted != rank.acquires:
            raise Wrong(f"stats count {counted} hits, misses and layers in place, but there were {rank.acquires}")

    def _trace(self, rank: Rank) -> None:
        nested = self.chance.random() < 0.3
        if rank.acquired or rank.barred:
            return
        layers = self.chance.choices(self.numbers, k=3)
        outcome = self.tell(rank, "traced", layers, nested)
        if nested or not self.config.prefetch_depth:
            self._must(outcome, "StateError")
        elif not self._must(outcome, "done"):
            raise Wrong("the trace is empty")
        else:
            rank.acquires += len(layers)

    def _peers(self, rank: Rank) -> None:
        expected = {other.number: other.state == "running" for other in self.ranks if other is not rank}
        if (found := self._done(rank, "call", "peers", timeout=LATE)) != expected:
            raise Wrong(f"peers says {found}, not {expected}")

    def _too_late(self, rank: Rank) -> None:
        calls: list[tuple[Any, ...]] = [("shard_late",), ("add_layer", self.numbers[0])]
        calls += [("call", "publish", SOON), ("call", "rejoin", SOON)]
        self._must(self.tell(rank, *self.chance.choice(calls)), "StateError")

    @property
    def _experts(self) -> int:
        return next(iter(self.layers.values()))["w0"][0][0]

    # -- together ------------------------------------------------------------------------------------------------------
    def _changed(self) -> tuple[Bytes, list[Any] | None]:
        """New bytes of some weights, and whose of them are written; of all where one could be half of each."""
        keys = self._weights()
        if any(each.barred for each in self.ranks):
            return self._bytes(keys), None
        chosen = self.chance.sample(keys, self.chance.randint(0 if self.chance.random() < 0.2 else 1, len(keys)))
        new = self._bytes(chosen)
        experts = self._experts
        placement = ExpertPlacement(experts, self.placed)
        owned = {owner: placement.experts(owner) for owner in [*range(self.config.group_size), HOST]}
        disjoint = sum(map(len, owned.values())) == experts
        if not disjoint or self.moved or self.chance.random() < 0.5:
            return new, None
        owners = self.chance.sample(list(owned), self.chance.randint(0, len(owned)))
        mixed = {}
        for key, data in new.items():
            each = len(data) // experts
            rows = [
                (data if any(expert in owned[owner] for owner in owners) else self.model[key])[row : row + each]
                for expert, row in enumerate(range(0, len(data), each))
            ]
            mixed[key] = b"".join(rows)
        return mixed, owners

    def _update(self, rank: Rank) -> None:
        """By all ranks, where they all can."""
        everybody = all(each.state == "running" for each in self.ranks)
        holding = [each for each in self.ranks if each.acquired]
        for each in holding:
            if self.chance.random() < 0.8 or len(self.ranks) > 1:
                self._reset(each)
        new, owners = self._changed()
        if not everybody:
            self._together([each for each in self.ranks if each.state == "running"], new, owners, SOON)
            return
        if any(each.acquired for each in self.ranks):
            self._must(self.tell(rank, "update", new, owners, SOON), "StateError")
            return
        updating = [
            self._begin(each, "update", new, owners, LATE, singly=self.moved or self.chance.random() < 0.4)
            for each in self.ranks
        ]
        if self.processes and self.chance.random() < 0.3:
            self._dies_in_update(self.chance.choice(self.ranks), updating, {**self.model, **new})
            return
        for updated in updating:
            self._must(updated(), "done")
        self.model = {**self.model, **new}
        self.candidates = [self.model]
        for each in self.ranks:
            each.barred = False

    def _dies_in_update(self, dying: Rank, updating: list[Callable[[], Outcome]], new: Bytes) -> None:
        """By all ranks or by none; where it is neither, the others read nothing until another succeeds."""
        self._kill(dying)
        survivors = [(each, updated) for each, updated in zip(self.ranks, updating, strict=True) if each is not dying]
        written: set[bool | None] = set()
        for each, updated in survivors:
            outcome = updated()
            sentence = self._must(outcome, "done", "ExchangeError")
            if outcome.kind == "done":
                each.barred = False
                written.add(True)
            elif sentence.startswith("nothing was written"):
                written.add(False)
            else:
                each.barred = True
                written.add(None)
        if {True, False} <= written:
            raise Wrong("one rank says that nothing was written, and another has updated")
        if True in written:
            self.candidates = [new]
        elif None in written:
            self.candidates = [self.model, new]
        self.model = self.candidates[-1]

    def _kill(self, rank: Rank) -> None:
        assert isinstance(rank.there, InProcess)
        self.steps.append(f"rank {rank.number} is killed")
        rank.there.kill()
        rank.state, rank.barred = "dead", False
        rank.acquired.clear()
        rank.kept = False

    def _death(self, rank: Rank) -> None:
        self._kill(rank)

    def _together(self, ranks: list[Rank], new: Bytes, owners: list[Any] | None, timeout: float) -> None:
        """An update that cannot succeed, because somebody is missing."""
        updating = [self._begin(each, "update", new, owners, timeout, singly=self.moved) for each in ranks]
        outcomes = [updated() for updated in updating]
        for each, outcome in zip(ranks, outcomes, strict=True):
            sentence = self._must(outcome, "ExchangeError")
            if not sentence.startswith("nothing was written") and not each.barred:
                raise Wrong(f"an update without some rank wrote: {sentence}")

    def _missed_update(self, rank: Rank) -> None:
        """One rank, or more, does not come."""
        running = [each for each in self.ranks if each.state == "running"]
        if len(self.ranks) == 1:
            return
        coming = self.chance.sample(running, self.chance.randint(1, len(running)))
        if len(coming) == len(self.ranks):
            coming.pop()
        for each in coming:
            if each.acquired:
                self._reset(each)
        new, owners = self._changed()
        self._together(coming, new, owners, SOON)

    def _bad_update(self, rank: Rank) -> None:
        what = self.chance.choice(["shape", "dtype", "layer", "weight", "owner", "no owner", "no tensor"])
        self._must(self.tell(rank, "bad_update", what), "ConfigError")

    def _rebalance(self, rank: Rank) -> None:
        """By all ranks, where they all can; one may die meanwhile. No byte of any expert changes."""
        most = self.chance.choice([0, 1, 3, 50])
        if not self.config.movable_experts:
            self._must(self.tell(rank, "rebalance", most, SOON), "ConfigError")
            return
        if rank.acquired or rank.barred:
            self._must(self.tell(rank, "rebalance", most, SOON), "StateError")
            return
        if any(each.state != "running" or each.barred for each in self.ranks):
            sentence = self._must(self.tell(rank, "rebalance", most, SOON), "ExchangeError")
            if not sentence.startswith("nothing was written"):
                raise Wrong(f"a rebalance without some rank wrote: {sentence}")
            return
        for each in self.ranks:
            self._reset(each)
            for layer in self.chance.sample(self.numbers, self.chance.randint(0, len(self.numbers))):
                if self._acquired(each, layer, "in_place", tokens=20, chosen=self._chosen()):
                    self._release_of(each, layer)
            self._reset(each)
        moving = [self._begin(each, "rebalance", most, LATE) for each in self.ranks]
        if self.processes and self.chance.random() < 0.4:
            self._dies_in_rebalance(rank, moving)
            return
        told = [self._must(moved(), "done") for moved in moving]
        if any(each != told[0] for each in told):
            raise Wrong(f"ranks disagree on what has moved: {told}")
        moved, orders = told[0]
        if moved > 2 * most:
            raise Wrong(f"{most} swaps move {moved} experts")
        self.moved = any(order != sorted(order) for order in orders)

    def _dies_in_rebalance(self, dying: Rank, moving: list[Callable[[], Outcome]]) -> None:
        self._kill(dying)
        self.moved = True
        for each, moved in zip(self.ranks, moving, strict=True):
            outcome = moved() if each is not dying else None
            if outcome is not None:
                sentence = self._must(outcome, "done", "ExchangeError")
                each.barred = outcome.kind != "done" and not sentence.startswith("nothing was written")

    def _sleep(self, rank: Rank) -> None:
        """And wake, by all ranks, where they all can; one may die in between, and come back."""
        keep = self.chance.random() < 0.7
        if self.config.assembly == "tensor_list" or rank.acquired:
            self._must(self.tell(rank, "call", "sleep", keep=keep, timeout=SOON), "StateError")
            return
        if any(each.state != "running" for each in self.ranks):
            self._must(self.tell(rank, "call", "sleep", keep=keep, timeout=SOON), "ExchangeError")
            return
        for each in self.ranks:
            self._reset(each)
        self._all("sleep", keep=keep)
        self._must(self._refused_call_asleep(rank), "StateError")
        if self.processes and self.chance.random() < 0.5:
            self._kill(rank)
            survivor = self.ranks[rank.number - 1]
            self._must(self.tell(survivor, "call", "wake", timeout=SOON), "ExchangeError")
            self._return(rank)
        if self.chance.random() < 0.2:
            self._all("sleep", keep=keep) if keep else None
        self._all("wake")
        if not keep:
            for each in self.ranks:
                each.barred = True
                self._must(self.tell(each, "acquire", self.numbers[0], tokens=1), "StateError")
            self._update(rank)

    def _all(self, call: str, **options: Any) -> None:
        begun = [self._begin(each, "call", call, timeout=LATE, **options) for each in self.ranks]
        for done in begun:
            self._must(done(), "done")

    def _refused_call_asleep(self, rank: Rank) -> Outcome:
        calls: list[tuple[Any, ...]] = [
            ("acquire", self.chance.choice(self.numbers)),
            ("call", "reset"),
            ("update", {}, None, SOON),
            ("call", "check_integrity"),
            ("traced", [], False),
            ("call", "publish"),
        ]
        return self.tell(rank, *self.chance.choice(calls))

    # -- coming and going ----------------------------------------------------------------------------------------------
    def _impostor(self, rank: Rank) -> None:
        """Another that says it is this rank, which is alive."""
        if self.processes:
            return
        other = self._enter(rank.number)
        try:
            self._done(other, "make")
            for number in self.numbers:
                self._done(other, "add_layer", number)
            self._must(self.tell(other, "call", "rejoin", timeout=SOON), "StateError")
            if left := self._done(other, "close"):
                raise Wrong(f"an impostor left {left}")
        finally:
            self._abandon(other)

    def _close(self, rank: Rank) -> None:
        left = self._done(rank, "close")
        if rank.kept:
            self._done(rank, "forget")
            left = self._done(rank, "close")
        if left:
            raise Wrong(f"close left {left}")
        rank.state = "closed"
        rank.acquired.clear()

    def _after_close(self, rank: Rank) -> None:
        """Nothing but `stats` and `close`; or a new one takes its place."""
        what = self.chance.choice(["refused", "stats", "close", "rejoin"])
        if what == "refused":
            self._must(self._refused_call(rank), "StateError")
        elif what == "stats":
            self._done(rank, "stats")
        elif what == "close":
            if self._done(rank, "close"):
                raise Wrong("there is something left after another close")
        elif self.chance.random() < 0.5:
            self._return(rank)

    def _return(self, rank: Rank) -> None:
        """A new one takes the place of this rank, which has left or died."""
        self._abandon(rank)
        new = self._enter(rank.number)
        self.ranks[rank.number] = new
        self._done(new, "make")
        for number in self.numbers:
            self._done(new, "add_layer", number)
        others = any(each.state == "running" for each in self.ranks)
        outcome = self.tell(new, "call", "rejoin", timeout=LATE if others else SOON)
        if self.config.assembly == "tensor_list":
            self._must(outcome, "StateError", *([] if others else ["ExchangeError"]))
            new.state = "closed"
        elif others:
            self._must(outcome, "done")
            new.state = "running"
            new.barred = any(each.barred for each in self.ranks if each is not new)
        else:
            self._must(outcome, "ExchangeError")
            new.state = "closed"

    def _end(self) -> None:
        for rank in self.ranks:
            if rank.state == "running":
                if not rank.barred:
                    self._done(rank, "call", "reset")
                    rank.acquired.clear()
                    for layer in self.numbers:
                        if self._acquired(rank, layer, None, tokens=9):
                            self._release_of(rank, layer)
                self._close(rank)
        left = [] if any(rank.state == "dead" for rank in self.ranks) else os.listdir(self.directory)
        if left:
            raise Wrong(f"the rendezvous has {left} at the end")

    def _release_of(self, rank: Rank, layer: int) -> None:
        self._must(self.tell(rank, "release", layer), "done")
        del rank.acquired[layer]
