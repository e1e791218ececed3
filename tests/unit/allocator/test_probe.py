"""What can be shared is found out by sharing; whatever refuses, nothing is left behind."""

from __future__ import annotations

import pytest

from vmm_dwdp.allocator.driver import HandleType, Location
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.probe import supported_handle_types
from vmm_dwdp.errors import DriverError


@pytest.mark.usefixtures("open_descriptors")
@pytest.mark.parametrize("call", ["create", "export", "import_"])
def test_whatever_refuses_is_named(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may accept a handle type when it creates memory, and refuse it later."""

    def refuse(*_: object) -> None:
        raise DriverError(call, "REFUSED", "share")

    driver = HostDriver()
    monkeypatch.setattr(driver, call, refuse)
    assert supported_handle_types(driver)[HandleType.POSIX_FD] == f"{call} failed with REFUSED while trying to share"


@pytest.mark.usefixtures("open_descriptors")
def test_the_host_shares_descriptors_and_nothing_else() -> None:
    refusals = supported_handle_types(HostDriver())
    assert refusals.keys() == set(HandleType)
    assert refusals[HandleType.POSIX_FD] is None
    assert refusals[HandleType.FABRIC] is not None


def test_a_location_that_does_not_exist() -> None:
    refusals = supported_handle_types(HostDriver(), Location(numa_node=99))
    assert all(refusal is not None and "NUMA node 99" in refusal for refusal in refusals.values())
