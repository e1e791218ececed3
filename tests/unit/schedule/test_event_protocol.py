"""No kernel reads a slot that does not hold its layer, in any order that threads and streams allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
from support.explorer import COMPUTE, Launch, RecordingDriver, explore, record

from vmm_dwdp.allocator.driver import Lane, Ticket
from vmm_dwdp.schedule.layer import Fetch, Slot, StagedLayer
from vmm_dwdp.schedule.staging import Staging

Run = Callable[[int], None]
ANOTHER = 99  # a stream beside the one that computes


def two_passes(num_layers: int, staging: Staging, run: Run) -> None:
    for _ in range(2):
        for layer in range(num_layers):
            run(layer)


def out_of_order(num_layers: int, staging: Staging, run: Run) -> None:
    for layer in reversed(range(num_layers)):
        run(layer)
    run(num_layers - 1)
    staging.reset(0)
    run(0)
    staging.reset(0)


def abandoned(num_layers: int, staging: Staging, run: Run) -> None:
    """A pass that ends by an exception inside its second layer."""
    run(0)
    staging.layers[1 % num_layers].acquire(0)
    staging.reset(0)
    for layer in range(num_layers):
        run(layer)
    staging.reset(0)


@pytest.mark.parametrize("thread", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_two_passes_in_every_order(num_layers: int, depth: int, thread: bool) -> None:
    found = explore(record(partial(two_passes, num_layers), num_layers, depth, thread=thread))
    assert found.violation is None


@pytest.mark.parametrize("launch", [out_of_order, abandoned])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_misses_and_abandoned_passes_in_every_order(launch: Callable[..., None], depth: int) -> None:
    found = explore(record(partial(launch, 4), 4, depth, thread=True))
    assert found.violation is None


@pytest.mark.parametrize("launch", [partial(two_passes, 3), partial(out_of_order, 3), partial(abandoned, 3)])
def test_two_copy_streams_in_every_order(launch: Launch) -> None:
    found = explore(record(launch, 3, 2, thread=False, num_streams=2))
    assert found.violation is None


def interrupted(handed_over: bool, staging: Staging, run: Run) -> None:
    """A fetch that ends before or after its job is handed over, and is made anew for another stream than the one that
    read the slot."""
    driver, issuer, first = staging._driver, staging.pipeline.issuer, staging.layers[0]
    assert isinstance(driver, RecordingDriver)
    submit = issuer.submit

    def interrupt(job: object) -> None:
        if handed_over:
            submit(job)
        raise KeyboardInterrupt

    first.acquire(ANOTHER)
    driver.kernel(0, ANOTHER)
    with mock.patch.object(issuer, "submit", interrupt), pytest.raises(KeyboardInterrupt):
        first.release(ANOTHER)
    staging.reset(COMPUTE)
    run(0)
    staging.reset(COMPUTE)


@pytest.mark.parametrize("thread", [False, True], ids=["inline", "thread"])
@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("num_streams", [1, 2])
def test_a_fetch_that_was_interrupted_and_is_made_anew(num_streams: int, handed_over: bool, thread: bool) -> None:
    found = explore(record(partial(interrupted, handed_over), 2, 1, thread=thread, num_streams=num_streams))
    assert found.violation is None


def test_the_explorer_reaches_orders_in_which_copies_and_kernels_overlap() -> None:
    few = explore(record(partial(two_passes, 2), 2, 1, thread=True)).num_states
    many = explore(record(partial(two_passes, 5), 5, 3, thread=True)).num_states
    assert many > 10 * few


class _SwappedConsumed(Staging):
    """Waits for the other slot's event before it overwrites a slot."""

    def _lanes(self, slot: Slot, fetch: Fetch) -> list[Lane]:
        other = self.slots[(self.slots.index(slot) + 1) % len(self.slots)]
        return [lane._replace(after=other.consumed.event) for lane in super()._lanes(slot, fetch)]


class _SwappedReady(Staging):
    """Tells the other slot's readers that this slot is filled."""

    def _lanes(self, slot: Slot, fetch: Fetch) -> list[Lane]:
        other = self.slots[(self.slots.index(slot) + 1) % len(self.slots)]
        return [lane._replace(then=other.ready[0].event) for lane in super()._lanes(slot, fetch)]


class _EarlyAtTheWrap(Staging):
    """At the end of a pass, fetches the first layers before the last ones, whose slots they take, are released."""

    class _layer(StagedLayer):
        def acquire(self, stream: int) -> None:
            super().acquire(stream)
            if self.following.is_first:
                self.following._fetch(stream)


class _NeverWaitsForReady(Staging):
    class _layer(StagedLayer):
        def acquire(self, stream: int) -> None:
            real, self._driver.wait = self._driver.wait, lambda *_: None  # type: ignore[method-assign]
            super().acquire(stream)
            self._driver.wait = real  # type: ignore[method-assign]


class _NeverAwaitsTheIssuer(Staging):
    """Waits for an event that the issuing thread has yet to record, which is to wait for the record before."""

    class _layer(StagedLayer):
        def acquire(self, stream: int) -> None:
            self.slot.ticket = _NothingToAwait() if self.slot.ticket else None
            super().acquire(stream)


class _NothingToAwait(Ticket):
    done = True

    def result(self) -> None:
        pass


class _RecordsTooEarly(Staging):
    """Records that a slot was read before the kernel that reads it is launched."""

    class _layer(StagedLayer):
        def acquire(self, stream: int) -> None:
            super().acquire(stream)
            self._driver.record(self.slot.consumed.event, stream)

        def release(self, stream: int) -> None:
            real, self._driver.record = self._driver.record, lambda *_: None  # type: ignore[method-assign]
            super().release(stream)
            self._driver.record = real  # type: ignore[method-assign]


class _ForgetsWhatNothingRead(Staging):
    """Refills a slot that nothing read without waiting for the copies that another stream still makes into it."""

    class _layer(StagedLayer):
        def _fetch(self, stream: int) -> None:
            self.slot.read = True
            super()._fetch(stream)


def test_copies_of_two_streams_that_meet_in_a_slot_are_found() -> None:
    launch = partial(out_of_order, 3)
    found = explore(record(launch, 3, 2, thread=False, staging=_ForgetsWhatNothingRead, num_streams=2))
    assert found.violation is not None


@pytest.mark.parametrize(
    "broken",
    [
        _SwappedConsumed,
        _SwappedReady,
        _EarlyAtTheWrap,
        _NeverWaitsForReady,
        _NeverAwaitsTheIssuer,
        _RecordsTooEarly,
    ],
)
def test_a_broken_protocol_is_found(broken: type[Staging]) -> None:
    launch: Launch = partial(two_passes, 5)
    found = explore(record(launch, 5, 2, thread=True, staging=broken))
    assert found.violation is not None
