"""The one family of exceptions of this project; every module may import this one, and it imports nothing.

Each is also the exception of Python's own that callers would expect in its place.
"""

_FULL = ("CUDA_ERROR_OUT_OF_MEMORY", "ENOMEM", "ENOSPC")  # what drivers say where there is no room


class DWDPError(Exception):
    """Base of everything this library raises on purpose. The message is one sentence that names what was wrong."""


class ConfigError(DWDPError, ValueError):
    """A value that cannot be: in a config, a weight specification, a checkpoint or a call's arguments."""


class ExchangeError(DWDPError, RuntimeError):
    """Another rank did not come, did not answer in time, or sent something that is not acceptable."""


class StateError(DWDPError, RuntimeError):
    """A call at the wrong moment: a shard asked for after publish, a layer acquired twice, a runtime already closed."""


class DriverError(DWDPError, RuntimeError):
    """A driver call failed.

    Attributes:
        call: the driver's own name of the call, for example ``cuMemMap`` or ``mmap``.
        code: the driver's own name of the result, for example ``CUDA_ERROR_OUT_OF_MEMORY`` or ``ENOMEM``.
        attempt: what was being attempted, in words.
    """

    def __init__(self, call: str, code: str, attempt: str) -> None:
        super().__init__(f"{call} failed with {code} while trying to {attempt}")
        self.call = call
        self.code = code
        self.attempt = attempt

    @property
    def is_for_want_of_memory(self) -> bool:
        """Whether there is not so much memory as was asked for."""
        return self.code in _FULL
