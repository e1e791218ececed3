"""What the runtime says of a bank, and refuses: looked up out of turn, too small, too large, or with other bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.banks import look_up_and_check, models_of, some_experts
from support.drivers import SmallDriver
from support.faults import FaultyDriver
from support.groups import PAGE, add_layers, check_pass, fill_shards, join, random_model

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.driver import EventId, StreamId
from vmm_dwdp.kernels.bank import look_up
from vmm_dwdp.kernels.bank_table import BankTable
from vmm_dwdp.memory import bank as memory_bank
from vmm_dwdp.observe.stats import BankCounts, BankStats

EXPERTS = 6  # of 4000 bytes: three of them take three pages
MODEL = random_model({number: {"w": ((EXPERTS, 1000), torch.float32)} for number in range(4)})
CONFIG = DWDPConfig(
    group_size=1, host_experts=4, mode="in_place", prefetch_depth=2, expert_bank=4 * 3 * PAGE, checksums=True
)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = join(CONFIG, 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    assert runtime.close().open() == []


def experts(*numbers: int) -> torch.Tensor:
    """A token for each of them."""
    return torch.tensor(numbers)[:, None]


def use(runtime: DWDPRuntime, layer: int, *numbers: int) -> list[int]:
    """A token for each of the experts; where they were read."""
    with runtime.layer(layer):
        return runtime.look_up(layer, experts(*numbers)).rows.flatten().tolist()


def test_what_was_used_is_in_the_bank_from_then_on(runtime: DWDPRuntime) -> None:
    assert runtime.stats().bank == BankStats(nbytes=4 * 3 * PAGE, rows=dict.fromkeys(range(4), 3))
    assert use(runtime, 1, 4, 0, 2, 4) == [1, 3 + 0, 0, 1], "expert 0 is this rank's own"
    assert use(runtime, 1, 4, 2) == [1, 0]
    assert use(runtime, 1, 2, 5, 3) == [0, 3 + 5, 2], "of those used as often, the lower number"
    assert use(runtime, 1, 5) == [3 + 5], "before, it was used as often as expert 3"
    assert use(runtime, 1, 5) == [2], "before, it was used more often"
    assert runtime.bank_counts()[1] == BankCounts(uses=9, hits=3, copied=4)
    assert runtime.bank_counts()[0] == BankCounts(0, 0, 0)
    runtime.check_integrity(verify=True)


def test_every_form_of_the_kernels_is_launched_before_the_first_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture may have that. On a GPU: tests/gpu/test_bank_on_gpu.py."""
    launched = []

    def recorded(
        table: BankTable, chosen: torch.Tensor, weights: Sequence[torch.Tensor], *, copies: bool
    ) -> torch.Tensor:
        launched.append((table, [weight.data_ptr() for weight in weights], chosen.dtype, copies))
        return look_up(table, chosen, weights, copies=copies)

    monkeypatch.setattr(memory_bank, "look_up", recorded)
    with join(CONFIG, 0, tmp_path / "rendezvous", MODEL) as runtime:
        before = launched.copy()
        for layer, chosen in itertools.product(MODEL, (experts(2), experts(*[4] * 33))):
            for ids in (chosen, chosen.int()):
                with runtime.layer(layer):
                    runtime.look_up(layer, ids)
        assert all(form in before for form in launched)
        assert len(launched) == 2 * len(before) == 2 * 4 * 4
        assert runtime.bank_counts()[0] == BankCounts(uses=4, hits=1, copied=1)


def test_the_tensor_by_expert_and_the_wider_one_share_their_bytes(runtime: DWDPRuntime) -> None:
    with runtime.layer(2) as weights:
        found, rows = runtime.look_up(2, experts(5, 1))
        assert found["w"].shape == (3 + EXPERTS, 1000)  # type: ignore[union-attr]
        assert weights["w"].data_ptr() == found["w"][3].data_ptr()  # type: ignore[union-attr]
        assert rows.flatten().tolist() == [0, 3 + 1]
        del found, weights
    check_pass(runtime, MODEL)


def test_a_pass_of_many_tokens_brings_nothing_into_the_bank(runtime: DWDPRuntime) -> None:
    assert use(runtime, 0, 2) == [0]
    assert use(runtime, 0, *[2] * 20, *[4] * 13) == [0] * 20 + [3 + 4] * 13
    assert runtime.bank_counts()[0] == BankCounts(uses=3, hits=1, copied=1)


def test_without_a_bank_and_staged_a_layer_is_read_by_expert(tmp_path: Path, runtime: DWDPRuntime) -> None:
    chosen = experts(5, 1)
    with runtime.layer(0, mode="staged") as weights:
        assert runtime.look_up(0, chosen) == (weights, chosen)
        del weights
    with join(replace(CONFIG, expert_bank=0), 0, tmp_path / "other", MODEL) as other:
        with other.layer(0) as weights:
            assert other.look_up(0, chosen) == (weights, chosen)
            del weights
        assert other.stats().bank is None
        assert other.bank_counts() == {}


def test_where_nothing_is_remote_there_is_no_bank(tmp_path: Path) -> None:
    with join(replace(CONFIG, host_experts=0), 0, tmp_path / "rendezvous", MODEL) as runtime:
        assert runtime.stats().bank is None
        assert use(runtime, 0, 5, 1) == [5, 1]


def test_a_bank_is_no_larger_than_what_is_remote(tmp_path: Path) -> None:
    with join(replace(CONFIG, expert_bank=1 << 40), 0, tmp_path / "rendezvous", MODEL) as runtime:
        assert runtime.stats().bank == BankStats(nbytes=4 * 4 * PAGE, rows=dict.fromkeys(range(4), 4))
        generator = torch.Generator().manual_seed(0)
        banks = models_of(runtime, MODEL)
        for _ in range(5):
            look_up_and_check(runtime, MODEL, 0, some_experts(EXPERTS, 3, 2, generator), banks)


def test_a_layer_is_looked_up_once_between_acquire_and_release(runtime: DWDPRuntime) -> None:
    with pytest.raises(StateError, match="layer 1 is not acquired: there is nothing to look up"):
        runtime.look_up(1, experts(2))
    runtime.acquire(1)
    runtime.look_up(1, experts(2))
    with pytest.raises(StateError, match="layer 1 was looked up since it was acquired"):
        runtime.look_up(1, experts(3))
    runtime.release(1)
    with pytest.raises(StateError, match="layer 1 is not acquired"):
        runtime.look_up(1, experts(2))
    assert use(runtime, 1, 3) == [1]
    with pytest.raises(ConfigError, match="there is no layer 9"):
        runtime.look_up(9, experts(2))


def test_a_pass_that_was_given_up_may_be_begun_anew(runtime: DWDPRuntime) -> None:
    runtime.acquire(1)
    runtime.look_up(1, experts(2))
    runtime.reset()
    assert use(runtime, 1, 2) == [0]
    runtime.check_integrity(verify=True)


@pytest.mark.parametrize(
    "chosen",
    [
        torch.tensor([2]),
        torch.tensor([[2.0]]),
        torch.tensor([[2, 3], [4, 5]]).t(),
        torch.tensor([[2]], device="meta"),
        torch.tensor([[2]], dtype=torch.int16),
    ],
    ids=["one dimension", "float", "strides", "device", "int16"],
)
def test_what_cannot_be_looked_up_is_refused(runtime: DWDPRuntime, chosen: torch.Tensor) -> None:
    for mode in ("in_place", "staged"):
        with (
            runtime.layer(0, mode=mode),  # type: ignore[arg-type]
            pytest.raises(ConfigError, match=r"chosen must be a contiguous int32 or int64 tensor \[tokens, top_k\] on"),
        ):
            runtime.look_up(0, chosen)
    assert use(runtime, 0, 2) == [0]


def test_a_token_that_chooses_more_experts_than_there_are_rows_is_refused(runtime: DWDPRuntime) -> None:
    with (
        runtime.layer(0),
        pytest.raises(
            ConfigError,
            match=f"the bank of layer 0 has 3 rows, and a token uses 4 experts: an expert_bank of {4 * 4 * PAGE} bytes",
        ),
    ):
        runtime.look_up(0, torch.tensor([[2, 3, 4, 5]]))
    assert use(runtime, 0, 2) == [0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mode": "staged"}, "expert_bank needs mode: in_place or auto"),
        ({"resident_cache": PAGE}, "expert_bank and resident_cache are for the same experts"),
        ({"expert_bank": -1}, "expert_bank must be at least 0, not -1"),
        ({"expert_bank": "4 GiB"}, "expert_bank must be a whole number, not '4 GiB'"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DWDPConfig(**(vars(CONFIG) | changes))  # type: ignore[arg-type]


def test_a_bank_without_room_for_an_expert_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    runtime = DWDPRuntime(replace(CONFIG, expert_bank=4 * PAGE - 1), 0, "cpu", tmp_path, driver=FaultyDriver())
    add_layers(runtime, MODEL)
    fill_shards(runtime, MODEL)
    with pytest.raises(
        ConfigError, match=f"expert_bank is {4 * PAGE - 1} bytes, and one expert of each layer takes {4 * PAGE}, in"
    ):
        runtime.publish()
    assert runtime.ledger.open() == []


def test_a_bank_that_does_not_fit_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    driver = SmallDriver(1 << 40)
    runtime = DWDPRuntime(CONFIG, 0, "cpu", tmp_path, driver=driver)
    add_layers(runtime, MODEL)
    driver.room[True] = runtime.memory_needed().on_device + 7 * PAGE
    fill_shards(runtime, MODEL)
    with pytest.raises(
        ConfigError, match=f"an expert_bank of {12 * PAGE} bytes does not fit .*: after {6 * PAGE} of them, cuMemCreate"
    ):
        runtime.publish()
    assert runtime.ledger.open() == []


def test_after_update_and_sleep_nothing_is_in_the_bank(runtime: DWDPRuntime) -> None:
    for call in (lambda: runtime.update({}), lambda: (runtime.sleep(), runtime.wake())):
        use(runtime, 0, 2, 4)
        call()
        hits = runtime.bank_counts()[0].hits
        assert use(runtime, 0, 2) == [0]
        assert runtime.bank_counts()[0].hits == hits
        runtime.check_integrity(verify=True)


def test_while_asleep_a_bank_has_no_memory(runtime: DWDPRuntime) -> None:
    use(runtime, 0, 2, 4)
    before = runtime.ledger.counts()["mappings"]
    runtime.sleep()
    assert runtime.stats().bank == BankStats(nbytes=0, rows=dict.fromkeys(range(4), 3))
    runtime.wake()
    assert runtime.stats().bank == BankStats(nbytes=4 * 3 * PAGE, rows=dict.fromkeys(range(4), 3))
    assert runtime.ledger.counts()["mappings"] == before


def test_other_bytes_in_the_bank_are_found(runtime: DWDPRuntime) -> None:
    use(runtime, 3, 2, 4)
    with runtime.layer(3):
        found, _ = runtime.look_up(3, experts(4))
        found["w"].view(torch.uint8)[1, 17] ^= 1  # type: ignore[union-attr]
        del found
    with pytest.raises(StateError, match="the bank of layer 3, w, has other bytes of expert 4 than its owner"):
        runtime.check_integrity(verify=True)
    runtime.update({})
    runtime.check_integrity(verify=True)


@pytest.mark.parametrize("rows", [{2: 0, 4: 0}, {2: 3}, {2: -2}, {0: 0}], ids=["twice", "past", "before", "own"])
def test_a_table_that_was_not_planned_is_found(runtime: DWDPRuntime, rows: dict[int, int]) -> None:
    use(runtime, 0, 2)
    bank = runtime._assembly.bank
    assert bank is not None
    for expert, row in rows.items():
        bank._tables[0].rows[expert] = row
    with pytest.raises(StateError, match="the table of the bank of layer 0 is not one that was planned"):
        runtime.check_integrity(verify=True)


def test_a_pass_on_another_stream_waits_for_the_one_before(
    runtime: DWDPRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here streams have no compute: what the driver is asked for tells. On a GPU: tests/gpu/test_bank_on_gpu.py."""
    driver = runtime._driver
    first, second = driver.create_stream(), driver.create_stream()
    asked: list[tuple[str, StreamId]] = []
    record, wait = driver.record, driver.wait

    def recorded(event: EventId, stream: StreamId, *, external: bool = False) -> None:
        asked.append(("record", stream))
        record(event, stream, external=external)

    def waited(stream: StreamId, event: EventId, *, external: bool = False) -> None:
        asked.append(("wait", stream))
        wait(stream, event, external=external)

    monkeypatch.setattr(driver, "record", recorded)
    monkeypatch.setattr(driver, "wait", waited)
    for stream in (first, first, second, first):
        monkeypatch.setattr(driver, "current_stream", lambda stream=stream: stream)
        use(runtime, 0, 2)
    assert asked == [
        ("record", first),
        ("record", first),
        ("wait", second),
        ("record", second),
        ("wait", first),
        ("record", first),
    ]
    asked.clear()
    runtime.acquire(0)
    runtime.look_up(0, experts(3))
    runtime._schedule.in_place.reset()  # type: ignore[union-attr]
    assert asked == [("record", first)], "what was given up may still be read"
    monkeypatch.undo()
    runtime.reset()
    for stream in (first, second):
        driver.destroy_stream(stream)
