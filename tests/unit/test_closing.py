"""Closing what is broken: no step that fails stops the others, and the user's exception stays the user's."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch
from support.groups import PAGE, check_pass, in_threads, join, random_model

from vmm_dwdp import DriverError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.handles import Event, Ledger
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.schedule.issue import ThreadIssuer
from vmm_dwdp.schedule.lifecycle import Lifecycle

MODEL = random_model({number: {"w": ((8, 3000), torch.float32)} for number in range(3)})


class Failed(HostDriver):
    """A device that answers every call but those that need none with an error, once it has failed."""

    failed = False

    def synchronize(self, stream: int | None = None) -> None:
        if self.failed:
            raise DriverError("cuCtxSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", "wait for cuda:0")
        super().synchronize(stream)


def test_a_rank_whose_device_has_failed_leaves_its_group(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2, host_experts=3, slice_bytes=64)  # many copies, which a thread gives
    drivers = [Failed(PAGE), HostDriver(PAGE)]
    runtime, other = in_threads(lambda rank: join(config, rank, tmp_path / "group", MODEL, drivers[rank]), 2)
    drivers[0].failed = True  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(DriverError, match="ILLEGAL_ADDRESS") as raised:
            runtime.close()
        left = {kind: number for kind, number in runtime.ledger.counts().items() if number}
        assert raised.value.__notes__ == ["left open: " + ", ".join(f"{n} {kind}" for kind, n in left.items())]
        assert "threads" not in left
        assert "mappings" in left, "memory is not taken from under kernels that may still run"
    assert not (tmp_path / "group" / "rank-0").exists()
    assert other.peers() == {0: False}
    names = {thread.name for thread in threading.enumerate()}
    assert "vmm-dwdp-issue" in names, "the other rank's"
    assert other.close().open() == []
    assert "vmm-dwdp-issue" not in {thread.name for thread in threading.enumerate()}
    drivers[0].failed = False  # type: ignore[attr-defined]
    assert runtime.close().open() == []


def test_what_the_user_raised_is_what_is_raised(tmp_path: Path) -> None:
    driver = Failed(PAGE)
    config = DWDPConfig(group_size=1, host_experts=8)
    runtime = join(config, 0, tmp_path / "group", MODEL, driver)
    with pytest.raises(ZeroDivisionError) as raised, runtime:  # noqa: PT012  # what it raises is the matter
        driver.failed = True
        raise ZeroDivisionError("the user's own")
    assert any("ILLEGAL_ADDRESS" in note for note in raised.value.__notes__)
    driver.failed = False
    assert runtime.close().open() == []


def test_a_layer_that_was_given_up_inside_its_block(tmp_path: Path) -> None:
    with join(DWDPConfig(group_size=1, host_experts=8), 0, tmp_path / "group", MODEL) as runtime:
        with pytest.raises(ZeroDivisionError), runtime.layer(0):  # noqa: PT012
            runtime.reset()  # as an engine's error handler does
            raise ZeroDivisionError("the user's own")
        check_pass(runtime, MODEL)
        with pytest.raises(ZeroDivisionError), runtime.trace() as trace:  # noqa: PT012
            check_pass(runtime, MODEL)
            raise ZeroDivisionError("the user's own")
        assert trace.spans
        check_pass(runtime, MODEL)


def test_memory_goes_although_the_door_cannot_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=8), 0, tmp_path / "group", MODEL)

    def refuse() -> None:
        raise DriverError("unlink", "EROFS", "leave the rendezvous")

    monkeypatch.setattr(runtime._membership, "leave", refuse)
    with pytest.raises(DriverError, match="EROFS"):
        runtime.close()
    counts = runtime.ledger.counts()
    assert {
        kind: counts[kind] for kind in ("handles", "mappings", "reservations", "streams", "events")
    } == dict.fromkeys(("handles", "mappings", "reservations", "streams", "events"), 0)
    monkeypatch.undo()
    assert runtime.close().open() == []


@pytest.mark.parametrize("part", ["_schedule", "_membership"])
def test_a_part_that_cannot_be_freed_does_not_keep_memory(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = join(DWDPConfig(group_size=1, host_experts=8), 0, tmp_path / "group", MODEL)

    def refuse() -> None:
        raise DriverError("cuEventDestroy", "CUDA_ERROR_UNKNOWN", "close")

    monkeypatch.setattr(getattr(runtime, part), "close", refuse)
    with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
        runtime.close()
    counts = runtime.ledger.counts()
    assert [counts[kind] for kind in ("handles", "mappings", "reservations")] == [0, 0, 0]
    monkeypatch.undo()
    assert runtime.close().open() == []


class Signalled(HostDriver):
    """Once it is armed, a signal arrives while it is waited for."""

    armed = False

    def synchronize(self, stream: int | None = None) -> None:
        if self.armed:
            self.armed = False
            signal.raise_signal(signal.SIGUSR1)
        super().synchronize(stream)


@pytest.mark.timeout(60)
def test_a_signal_handler_closes_while_its_thread_writes(tmp_path: Path) -> None:
    """As a server's does, on SIGTERM: it waits for the write, in the thread that it has stopped in the middle of it."""
    driver = Signalled(PAGE)
    runtime = join(DWDPConfig(group_size=1), 0, tmp_path / "group", MODEL, driver)
    closed: list[dict[str, int]] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: closed.append(runtime.close().counts()))
    try:
        with pytest.raises(StateError, match="closed"), runtime.updating(timeout=20) as update:  # noqa: PT012  # which write is the matter
            driver.armed = True
            for number in range(2):
                update.write(number, "w", MODEL[number]["w"])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert closed == [dict.fromkeys(closed[0], 0)]
    assert runtime.close().open() == []


def test_a_job_that_nobody_will_run_is_refused() -> None:
    """Where a handler of a signal has closed in the middle of the call that gives it: to wait for it has no end."""
    issuer = ThreadIssuer(HostDriver(PAGE), Ledger())
    job = issuer.job(lambda: None, ())
    issuer.submit(job).result()
    issuer.close()
    for give in (lambda: issuer.submit(job), issuer.flush):
        with pytest.raises(StateError, match="the runtime is closed"):
            give()


def test_what_was_closed_before_it_was_published_stays_closed() -> None:
    lifecycle = Lifecycle()
    lifecycle.close()
    lifecycle.publish()
    assert lifecycle.is_closed
    with pytest.raises(StateError, match="closed"):
        lifecycle.require_running()


def test_close_finds_what_lost_its_owner(tmp_path: Path) -> None:
    """Somebody was interrupted between making it and keeping it."""
    runtime = join(DWDPConfig(group_size=1, host_experts=8), 0, tmp_path / "group", MODEL)
    Event(runtime._driver, runtime.ledger, "nobody's")
    assert runtime.close().open() == []


def test_integrity_sees_edges_and_slots(tmp_path: Path) -> None:
    config = DWDPConfig(group_size=2, checksums=True)
    odd = random_model({number: {"w": ((6, 1777), torch.bfloat16)} for number in range(3)})
    runtimes = in_threads(lambda rank: join(config, rank, tmp_path / "group", odd), 2)
    runtime: DWDPRuntime = runtimes[0]
    layer = runtime._layers.in_order[0]
    plan = layer.plan
    for segments in plan.edges, *plan.streams:
        copy = runtime._assembly.copies(layer, segments)[0]
        held = torch.empty(0, dtype=torch.uint8).set_(
            torch._C._construct_storage_from_data_pointer(copy.dst, torch.device("cpu"), copy.nbytes), 0, (copy.nbytes,)
        )
        runtime.check_integrity(verify=True)
        was = held[-1].item()
        held[-1] = was ^ 1
        with pytest.raises(StateError, match=r"layer 0, w: what this rank has of rank 1"):
            runtime.check_integrity(verify=True)
        held[-1] = was
        runtime.check_integrity(verify=True)
        del held
    for each in runtimes:
        assert each.close().open() == []
