from collections.abc import Callable
from typing import Any

# Besides, what `vmm_dwdp.schedule.hit_path` takes from here: it has the types of its twin in Python.

class Job:
    whole: bool
    @property
    def done(self) -> bool: ...
    def result(self) -> None: ...

class Issuer:
    whole: bool
    @property
    def seconds_per_byte(self) -> float: ...
    def __init__(
        self,
        set_current: int,
        wait_event: int,
        copy_batch: int,
        record_event: int,
        context: int,
        failure: Callable[[str, int], Exception],
        choosing: tuple[int, ...] | None = None,  # lines: their address, bytes of each, ranks, rank; two more calls
        /,
    ) -> None: ...
    @property
    def native_id(self) -> int: ...
    # a lane: stream, after, batches, then; and, if its batches are runs, the owner and where its words are
    def job(self, lanes: tuple[tuple[Any, ...], ...], kept: object, /) -> Job: ...
    def submit(self, job: Job, /) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
