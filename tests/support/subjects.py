"""What the interrupter interrupts: each public call in turn, with what the documentation says to do afterwards."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from support.drivers import FailingDriver
from support.groups import Model, Shapes, add_layers, fill_shards, in_threads, join, random_model, same_bytes
from support.moved import ask_for_tables, check_held, route, write_all
from vmm_dwdp import DriverError, DWDPConfig, DWDPError, DWDPRuntime, ExchangeError, StateError
from vmm_dwdp.config import Mode

# Experts that end inside pages of 4 KiB, and more layers than slots, so that the first and the last share one.
SHAPES: Shapes = {number: {"w": ((6, 1100 + 300 * (number == 3)), torch.float32)} for number in range(5)}
OLD, NEW = random_model(SHAPES, seed=1), random_model(SHAPES, seed=2)
SOON = 1.5  # seconds: how long a rank waits for one that does not come
A_WHILE = 6.0  # seconds: for one that does, but slowly, because each of its steps is looked at
LATE = 20.0  # seconds: for one that does

MakeDriver = Callable[[], FailingDriver]


def in_use() -> Counter[str]:
    """What this process has open: descriptors, memory files, threads of the library."""
    counts: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            link = os.readlink(f"/proc/self/fd/{descriptor}")
            counts[f"descriptor {link.split(':')[0] if ':' in link else link}"] += 1
    counts["mapped memory files"] = Path("/proc/self/maps").read_text().count("memfd:vmm_dwdp")
    counts["threads"] = sum(thread.name.startswith("vmm-dwdp") for thread in threading.enumerate())
    return counts


def nothing_left(before: Counter[str]) -> None:
    """As much is in use as ``before``."""
    if in_use() != before:
        gc.collect()
    found = in_use()
    assert found == before, f"left: {dict(found - before)}"


def modes(config: DWDPConfig) -> list[Mode]:
    """Those that can be asked for."""
    return ["staged"] * bool(config.prefetch_depth) + ["in_place"] * config.reads_in_place  # type: ignore[list-item]


def found(runtime: DWDPRuntime, layer: int, mode: Mode | None) -> set[tuple[str, int]]:
    """Which weights an acquired layer has: their age, and the layer whose they are. They are looked up if there is a
    bank."""
    with runtime.layer(layer, mode=mode, tokens=7) as weights:
        whole = weights["w"]
        if runtime.config.expert_bank:
            weights, rows = runtime.look_up(layer, torch.arange(6)[:, None])
            whole = weights["w"][rows.flatten()]  # type: ignore[index]
        if isinstance(whole, list):
            whole = torch.cat(whole)
        if runtime.config.movable_experts:
            whole = whole[runtime.logical_to_physical(layer)]
        fitting = {
            (age, other)
            for age, model in (("old", OLD), ("new", NEW))
            for other in model
            if same_bytes(whole, model[other]["w"])
        }
        del weights, whole
    return fitting


def acquired(runtime: DWDPRuntime, layer: int, mode: Mode | None, model: Model) -> None:
    """One acquire and release, with every byte compared in between."""
    fitting = found(runtime, layer, mode)
    age = "old" if model is OLD else "new"
    assert (age, layer) in fitting, f"layer {layer} ({mode}) has the bytes of {fitting or 'no layer'}, and is {age}"


def check_every_byte(runtime: DWDPRuntime, model: Model) -> None:
    """Passes in each mode, in order and out of it."""
    layers = list(model)
    for order in (layers, [3, 0, 4, 4, 1, 2], layers):
        for mode in modes(runtime.config):
            for layer in order:
                acquired(runtime, layer, mode, model)
        runtime.reset()


def read(runtime: DWDPRuntime) -> str:
    """Which weights all layers have in all modes, or that they cannot be read."""
    ages = set()
    for mode in modes(runtime.config):
        for layer in OLD:
            try:
                fitting = [age for age, whose in found(runtime, layer, mode) if whose == layer]
            except StateError as error:
                assert "partly old and partly new" in str(error), error  # noqa: PT017
                ages.add("barred")
            else:
                ages.add(fitting[0] if fitting else "neither")
    assert ages in ({"old"}, {"new"}, {"barred"}), f"of all layers some are {' and some '.join(sorted(ages))}"
    return ages.pop()


def shards(runtime: DWDPRuntime, model: Model) -> dict[Any, torch.Tensor]:
    """What this rank writes of ``model``."""
    return {
        (number, name, owner): tensor[slice(experts.start, experts.stop)]
        for number, weights in model.items()
        for name, tensor in weights.items()
        for owner in runtime.held_owners
        for experts in [runtime.local_experts(number, owner)]
    }


class Group:
    """Rank 0, which is interrupted, on a driver of its own; the other ranks are in this process too."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver) -> None:
        self.before = in_use()
        self.config = config
        self.directory = tempfile.TemporaryDirectory()
        self.drivers = [make_driver(), *(FailingDriver() for _ in range(1, config.group_size))]
        self.runtimes = in_threads(
            lambda rank: join(config, rank, self.directory.name, OLD, self.drivers[rank]), config.group_size
        )
        self.runtime, self.others = self.runtimes[0], self.runtimes[1:]
        self.driver = self.drivers[0]
        self.forgives = False  # whether a call that was refused may be told by a later one

    def prepare(self) -> None:
        self.forgives = True

    def again(self, call: Callable[[], object]) -> None:
        """``call``, once more if it tells of the driver call that failed before: it may be repeated."""
        try:
            call()
        except DriverError as error:
            if not self.forgives or "INJECTED" not in str(error):
                raise
            self.forgives = False
            call()

    def close(self) -> None:
        for runtime in self.runtimes:
            runtime.close()
        left = [runtime.ledger.open() for runtime in self.runtimes]
        assert left == [[]] * len(left), f"left at the end: {left}"
        files = os.listdir(self.directory.name)
        assert not files, f"left in the rendezvous: {files}"
        self.directory.cleanup()
        self.runtimes = self.others = []
        nothing_left(self.before)


class Pass(Group):
    """Acquire and release of all layers in some order: `reset` after an exception."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver, order: Sequence[int], mode: Mode | None) -> None:
        super().__init__(config, make_driver)
        self.order = order
        self.mode = mode

    def operate(self) -> None:
        for layer in self.order:
            acquired(self.runtime, layer, self.mode, OLD)

    def recover(self) -> None:
        def recovered() -> None:
            self.runtime.reset()
            self.runtime.check_integrity()
            check_every_byte(self.runtime, OLD)

        self.again(recovered)


class PassGoneOn(Pass):
    """After a failing driver call `acquire` "may be repeated": the pass goes on without `reset`."""

    def operate(self) -> None:
        for layer in self.order:
            try:
                self.runtime.acquire(layer, mode=self.mode, tokens=7)
            except DriverError:
                self.runtime.acquire(layer, mode=self.mode, tokens=7)
            try:
                self.runtime.release(layer)
            except DriverError:
                self.runtime.reset()
                return


class LookUp(Pass):
    """Passes that change what a bank holds: `reset` after an exception, and each row has the bytes of its expert."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver, order: Sequence[int], mode: Mode | None) -> None:
        super().__init__(config, make_driver, order, mode)
        self.chosen = itertools.cycle([[4, 0], [2, 5], [3, 5, 5]])

    def operate(self) -> None:
        for layer in self.order:
            self.look_up(layer, next(self.chosen))

    def look_up(self, layer: int, chosen: list[int]) -> None:
        with self.runtime.layer(layer, mode="in_place", tokens=len(chosen)):
            weights, rows = self.runtime.look_up(layer, torch.tensor(chosen)[:, None])
            read = weights["w"][rows.flatten()]  # type: ignore[index]
            del weights
        assert same_bytes(read, OLD[layer]["w"][chosen]), f"of layer {layer}, {chosen} have other bytes"

    def recover(self) -> None:
        def recovered() -> None:
            self.runtime.reset()
            self.runtime.check_integrity(verify=self.config.checksums)
            for chosen in ([2, 4], [3, 1], [5, 2]):
                for layer in OLD:
                    self.look_up(layer, chosen)
            self.runtime.check_integrity(verify=self.config.checksums)

        self.again(recovered)
        super().recover()


class Reset(Pass):
    """`reset` of a pass that was given up in its middle: "it may be repeated"."""

    def prepare(self) -> None:
        super().prepare()
        for layer in (0, 1, 2):
            acquired(self.runtime, layer, self.mode, OLD)
        for layer in {"staged": (4,), "in_place": (3, 4)}[self.mode or self.config.mode]:
            self.runtime.acquire(layer, mode=self.mode, tokens=7)

    def operate(self) -> None:
        self.runtime.reset()


class StatedPass(Pass):
    """A pass that is stated once, and ends before its last layer."""

    def operate(self) -> None:
        with self.runtime.forward_pass(mode=self.mode, tokens=7):
            for layer in self.order:
                self.runtime.acquire(layer)
                self.runtime.release(layer)


class Traced(Pass):
    """A pass that is traced: afterwards another trace can be recorded, and no event is left in the ledger."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver, order: Sequence[int], mode: Mode | None) -> None:
        super().__init__(config, make_driver, order, mode)
        self.events = self.runtime.ledger.counts()["events"]

    def operate(self) -> None:
        with self.runtime.trace():
            super().operate()

    def recover(self) -> None:
        super().recover()
        with self.runtime.trace() as trace:
            acquired(self.runtime, 0, self.mode, OLD)
        assert trace.spans, "nothing was traced"
        left = self.runtime.ledger.counts()["events"] - self.events
        assert not left, f"{left} events are left of a trace that is over"
        self.runtime.reset()


class Update(Group):
    """`update` of all ranks: all old, all new or barred, and `update` again."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver) -> None:
        super().__init__(config, make_driver)
        self.pool = ThreadPoolExecutor(max(1, config.group_size - 1))
        self.models = itertools.cycle([NEW, OLD])
        self.model = OLD
        self.pending: list[Future[None]] = []

    def prepare(self) -> None:
        super().prepare()
        self.model = next(self.models)
        self.pending = self.begin(SOON)

    def begin(self, timeout: float) -> list[Future[None]]:
        return [self.pool.submit(self.update, runtime, timeout) for runtime in self.others]

    def update(self, runtime: DWDPRuntime, timeout: float) -> None:
        runtime.update(shards(runtime, self.model), timeout=timeout)

    def operate(self) -> None:
        self.update(self.runtime, LATE if not self.others else SOON)

    def recover(self) -> None:
        expected = "old" if self.model is OLD else "new"
        for runtime, future in zip(self.others, self.pending, strict=True):
            error = future.exception()
            assert error is None or isinstance(error, ExchangeError), repr(error)
            found = read(runtime)
            assert error is not None or found == expected, f"rank {runtime.rank} updated, and has {found}"
        self.again(lambda: read(self.runtime))
        pending = self.begin(LATE)
        self.again(lambda: self.update(self.runtime, LATE))
        for future in pending:
            future.result()
        for runtime in self.runtimes:
            self.again(lambda runtime=runtime: check_every_byte(runtime, self.model))  # type: ignore[misc]
            runtime.check_integrity(verify=self.config.checksums)

    def all_together(self, call: Callable[[DWDPRuntime], None]) -> None:
        pending = [self.pool.submit(call, runtime) for runtime in self.others]
        self.again(lambda: call(self.runtime))
        for future in pending:
            future.result()

    def close(self) -> None:
        self.pool.shutdown()
        self.pending.clear()  # errors in it hold tensors
        super().close()


class Updating(Update):
    """The same by `updating`, a tensor for each expert."""

    def update(self, runtime: DWDPRuntime, timeout: float) -> None:
        with runtime.updating(timeout) as update:
            for (number, name, owner), whole in shards(runtime, self.model).items():
                for expert, value in zip(runtime.local_experts(number, owner), whole, strict=True):
                    update.write(number, name, value, experts=expert, owner=owner)


class UpdateAndRead(Update):
    """`update`, and what the slots were filled with anew: whoever gives the copies may do so after it returned."""

    def operate(self) -> None:
        super().operate()
        for layer in (0, 1):
            acquired(self.runtime, layer, "staged", self.model)


class Sleep(Update):
    """`sleep` of all ranks: awake as before, or asleep, and `wake` of all ranks either way."""

    keep = True

    def prepare(self) -> None:
        Group.prepare(self)
        self.pending = [self.pool.submit(self.move, runtime, SOON) for runtime in self.others]

    def move(self, runtime: DWDPRuntime, timeout: float) -> None:
        runtime.sleep(keep=self.keep, timeout=timeout)

    def operate(self) -> None:
        self.move(self.runtime, LATE if not self.others else SOON)

    def recover(self) -> None:
        for future in self.pending:
            error = future.exception()
            assert error is None or isinstance(error, ExchangeError), repr(error)
        for runtime in self.runtimes:
            try:
                for layer in OLD:
                    self.again(lambda at=(runtime, layer): acquired(*at, None, self.model))  # type: ignore[misc]
            except StateError as error:
                told = "the group sleeps" if runtime.asleep else "weights are gone"
                assert told in str(error), error  # noqa: PT017
        self.all_together(lambda runtime: runtime.wake(timeout=LATE))
        if not self.keep:
            self.model = next(self.models)
            self.all_together(lambda runtime: self.update(runtime, LATE))
        for runtime in self.runtimes:
            self.again(lambda runtime=runtime: check_every_byte(runtime, self.model))  # type: ignore[misc]
            runtime.check_integrity(verify=self.config.checksums)


class GiveUp(Sleep):
    """`sleep` without keeping anything: old bytes or none, until all are written."""

    keep = False


class Wake(Sleep):
    """`wake` of all ranks: awake, or asleep as before."""

    def prepare(self) -> None:
        self.all_together(lambda runtime: runtime.sleep(keep=self.keep, timeout=LATE))
        super().prepare()

    def move(self, runtime: DWDPRuntime, timeout: float) -> None:
        runtime.wake(timeout=timeout)


class Rebalance(Update):
    """`rebalance` of all ranks: every byte as it was, or barred until all that was being moved is written."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver) -> None:
        super().__init__(config, make_driver)
        self.models = itertools.cycle([NEW, OLD])
        self.favourites = itertools.cycle(range(5))
        for runtime in self.runtimes:
            ask_for_tables(runtime, OLD)

    def prepare(self) -> None:
        Group.prepare(self)
        favourite = next(self.favourites)
        for runtime in self.runtimes:
            route(runtime, {number: [favourite, (favourite + 1) % 5] for number in OLD})
        self.pending = [self.pool.submit(self.move, runtime, A_WHILE) for runtime in self.others]

    def move(self, runtime: DWDPRuntime, timeout: float) -> None:
        runtime.rebalance(timeout=timeout)

    def operate(self) -> None:
        self.move(self.runtime, A_WHILE)

    def update(self, runtime: DWDPRuntime, timeout: float) -> None:
        write_all(runtime, self.model, timeout)

    def recover(self) -> None:
        age = "old" if self.model is OLD else "new"
        barred = False
        for runtime, future in zip(self.others, self.pending, strict=True):
            error = future.exception()
            assert error is None or isinstance(error, ExchangeError), repr(error)
            found = read(runtime)
            assert found == age or (error is not None and found == "barred"), f"rank {runtime.rank} has {found}"
            barred |= found == "barred"
        own: list[str] = []
        self.again(lambda: own.append(read(self.runtime)))
        assert own[-1] in (age, "barred"), own
        if barred or own[-1] == "barred":
            self.model = next(self.models)
            self.all_together(lambda runtime: self.update(runtime, LATE))
        else:
            self.all_together(lambda runtime: self.move(runtime, LATE))
        for runtime in self.runtimes:
            self.again(lambda runtime=runtime: check_every_byte(runtime, self.model))  # type: ignore[misc]
            runtime.check_integrity(verify=self.config.checksums)
        check_held(self.runtimes, OLD)


class Refresh(Group):
    """`refresh_cache`: every byte as it was, or no layer is read in place until another call succeeds."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver) -> None:
        super().__init__(config, make_driver)
        self.favourites = itertools.cycle([4, 2, 5])

    def prepare(self) -> None:
        super().prepare()
        favourite = next(self.favourites)
        for layer in OLD:
            self.runtime.acquire(layer, mode="in_place", tokens=9, chosen=torch.full((9, 1), favourite))
            self.runtime.release(layer)

    def operate(self) -> None:
        self.runtime.refresh_cache()

    def recover(self) -> None:
        with suppress(StateError):  # "call refresh_cache"
            for layer in OLD:
                acquired(self.runtime, layer, "in_place", OLD)
        self.runtime.reset()
        self.runtime.refresh_cache()
        self.runtime.check_integrity(verify=self.config.checksums)
        check_every_byte(self.runtime, OLD)


class Publish:
    """`publish`: if it raises, the runtime is closed, nothing stays, and the same can be tried again."""

    def __init__(self, config: DWDPConfig, make_driver: MakeDriver) -> None:
        self.config = config
        self.make_driver = make_driver
        self.driver = make_driver()
        self.directory = tempfile.TemporaryDirectory()
        self.runtime: DWDPRuntime | None = None
        self.pool = ThreadPoolExecutor(max(1, config.group_size - 1))
        self.pending: list[Future[DWDPRuntime]] = []

    def prepare(self) -> None:
        self.before = in_use()
        self.runtime = DWDPRuntime(self.config, 0, "cpu", self.directory.name, driver=self.driver)
        add_layers(self.runtime, OLD)
        fill_shards(self.runtime, OLD)
        self.pending = [self.pool.submit(self.join, rank) for rank in range(1, self.config.group_size)]

    def join(self, rank: int) -> DWDPRuntime:
        """Another rank, which does not wait for long for the one that is interrupted."""
        runtime = DWDPRuntime(self.config, rank, "cpu", self.directory.name, driver=FailingDriver())
        add_layers(runtime, OLD)
        fill_shards(runtime, OLD)
        runtime.publish(timeout=A_WHILE)
        return runtime

    def operate(self) -> None:
        assert self.runtime is not None
        self.runtime.publish(timeout=LATE)

    def recover(self) -> None:
        runtime, self.runtime = self.runtime, None
        assert runtime is not None
        came = []
        for future in self.pending:
            with suppress(ExchangeError):
                came.append(future.result())
        try:
            runtime.check_integrity()
        except StateError as error:
            left = runtime.ledger.open()
            began = "not published yet" not in str(error)  # otherwise its first line was not over, and all is as it was
            assert left == [] or not began, f"it raised and left {left}"
        else:
            try:
                check_every_byte(runtime, OLD)
            except DriverError as error:  # of copies that publish began: the first acquire tells of it
                if "INJECTED" not in str(error):
                    raise
                runtime.reset()
                check_every_byte(runtime, OLD)
        for each in (runtime, *came):
            left = each.close().open()
            assert left == [], f"left after another close: {left}"
        self.pending.clear()
        files = os.listdir(self.directory.name)
        assert not files, f"left in the rendezvous: {files}"
        nothing_left(self.before)

    def close(self) -> None:
        self.pool.shutdown()
        if self.runtime is not None:
            self.runtime.close()
        self.directory.cleanup()


class Settle(Publish):
    """`settle`: if it raises, the runtime is closed; all who settled have one number, and publish if all have."""

    def prepare(self) -> None:
        self.before = in_use()
        self.runtime = self.set_up(0, self.driver)
        self.pending = [self.pool.submit(self.join, rank) for rank in range(1, self.config.group_size)]

    def set_up(self, rank: int, driver: FailingDriver) -> DWDPRuntime:
        runtime = DWDPRuntime(self.config, rank, "cpu", self.directory.name, driver=driver)
        add_layers(runtime, OLD)
        return runtime

    def join(self, rank: int) -> DWDPRuntime:
        runtime = self.set_up(rank, FailingDriver())
        runtime.settle(timeout=A_WHILE)
        return runtime

    def operate(self) -> None:
        assert self.runtime is not None
        self.runtime.settle(timeout=LATE)

    def recover(self) -> None:
        runtime, self.runtime = self.runtime, None
        assert runtime is not None
        came = []
        for future in self.pending:
            with suppress(ExchangeError):
                came.append(future.result())
        self.pending.clear()
        group = [runtime, *came]
        numbers = {each.config.num_local_experts for each in group} - {"auto"}
        assert len(numbers) <= 1, numbers
        if runtime.closed:
            left = runtime.ledger.open()
            assert left == [], f"it raised and left {left}"
        elif numbers and len(group) == self.config.group_size:

            def load(rank: int) -> None:
                fill_shards(group[rank], OLD)
                group[rank].publish(timeout=LATE)

            in_threads(load, len(group))
            for each in group:
                check_every_byte(each, OLD)
        for each in group:
            left = each.close().open()
            assert left == [], f"left after another close: {left}"
        files = os.listdir(self.directory.name)
        assert not files, f"left in the rendezvous: {files}"
        nothing_left(self.before)


class Close(Publish):
    """`close`: the next `close` finishes what this one did not."""

    def prepare(self) -> None:
        super().prepare()
        assert self.runtime is not None
        self.runtime.publish()
        acquired(self.runtime, 0, None, OLD)

    def operate(self) -> None:
        assert self.runtime is not None
        self.runtime.close()

    def recover(self) -> None:
        assert self.runtime is not None
        with suppress(DWDPError):  # of a call that failed before
            self.runtime.close()
        super().recover()
