"""What may be named as a stream: by its number, or by an object of any library; and what may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.groups import join, random_model, same_bytes

from vmm_dwdp import ConfigError, DWDPConfig, DWDPRuntime, StateError
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.schedule.given_stream import StreamLike

MODEL = random_model({number: {"w": ((6, 1000), torch.float32)} for number in range(3)})


class Others:
    """A stream of another library."""

    def __init__(self, number: int, version: int = 0) -> None:
        self.told = version, number

    def __cuda_stream__(self) -> tuple[int, int]:
        return self.told


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[DWDPRuntime]:
    runtime = join(DWDPConfig(group_size=1, host_experts=4, mode="in_place"), 0, tmp_path / "rendezvous", MODEL)
    yield runtime
    assert runtime.close().open() == []


@pytest.mark.parametrize("stream", [0, Others(0)])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_streams_by_number_and_of_other_libraries(runtime: DWDPRuntime, stream: StreamLike, mode: str) -> None:
    for number, weights in MODEL.items():
        with runtime.layer(number, mode=mode, stream=stream) as found:  # type: ignore[arg-type]
            assert isinstance(found["w"], torch.Tensor)
            assert same_bytes(found["w"], weights["w"])
        runtime.acquire(number, mode=mode, stream=stream)  # type: ignore[arg-type]
        runtime.release(number, stream=stream)
    runtime.reset(stream=stream)
    del found


REFUSED: dict[str, tuple[StreamLike, type[Exception], str]] = {
    "another's": (1 << 40, StateError, "stream 0x10000000000 is of another device than cpu"),
    "another's object": (Others(99), StateError, "stream 0x63 is of another device than cpu"),
    "another version": (Others(0, version=1), ConfigError, "speaks version 1 of __cuda_stream__, not 0"),
    "none at all": ("0", ConfigError, "a stream is torch's, a number, or has __cuda_stream__, unlike '0'"),  # type: ignore[dict-item]
}
CALLS: dict[str, Callable[[DWDPRuntime, StreamLike], object]] = {
    "acquire": lambda runtime, stream: runtime.acquire(0, stream=stream),
    "release": lambda runtime, stream: runtime.release(0, stream=stream),
    "reset": lambda runtime, stream: runtime.reset(stream=stream),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_stream_here(runtime: DWDPRuntime, call: str, why: str) -> None:
    stream, kind, sentence = REFUSED[why]
    if call == "release":
        runtime.acquire(0)
    with pytest.raises(kind, match=sentence):
        CALLS[call](runtime, stream)
    if call == "release":
        runtime.release(0)
    with runtime.layer(0, mode="staged") as found:
        assert isinstance(found["w"], torch.Tensor)
        assert same_bytes(found["w"], MODEL[0]["w"])
    del found


def test_a_driver_knows_its_streams() -> None:
    driver = HostDriver()
    stream = driver.create_stream()
    assert driver.owns(stream)
    assert not HostDriver().owns(stream)
    driver.destroy_stream(stream)
    assert not driver.owns(stream)
