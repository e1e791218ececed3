from collections.abc import Callable

# Besides, what `vmm_dwdp.schedule.hit_path` takes from here: it has the types of its twin in Python.

class Job:
    @property
    def done(self) -> bool: ...
    def result(self) -> None: ...

class Issuer:
    def __init__(
        self,
        set_current: int,
        wait_event: int,
        copy_batch: int,
        record_event: int,
        context: int,
        failure: Callable[[str, int], Exception],
        /,
    ) -> None: ...
    def job(self, lanes: tuple[tuple[int, int, tuple[tuple[int, ...], ...], int], ...], kept: object, /) -> Job: ...
    def submit(self, job: Job, /) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
