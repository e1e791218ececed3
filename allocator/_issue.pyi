from collections.abc import Callable

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
    def close(self) -> None: ...
