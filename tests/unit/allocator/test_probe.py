"""What can be shared is found out by sharing; whatever refuses, nothing is left behind."""

from __future__ import annotations

import pytest

from vmm_dwdp.allocator.driver import HandleType, Location
from vmm_dwdp.allocator.host_driver import HostDriver
from vmm_dwdp.allocator.probe import supported_handle_types
from vmm_dwdp.errors import DriverError


@pytest.mark.usefixtures("open_descriptors")
@pytest.mark.parametrize("call", ["create", "export", "import_"])
@pytest.mark.parametrize("handle_type", HandleType)
def test_whatever_refuses_is_named(handle_type: HandleType, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may accept a handle type when it creates memory, and refuse it later."""

    def refuse(*_: object) -> None:
        raise DriverError(call, "REFUSED", "share")

    driver = HostDriver()
    monkeypatch.setattr(driver, call, refuse)
    assert supported_handle_types(driver)[handle_type] == f"{call} failed with REFUSED while trying to share"


@pytest.mark.usefixtures("open_descriptors")
def test_the_host_shares_memory_in_every_way() -> None:
    assert supported_handle_types(HostDriver()) == dict.fromkeys(HandleType)


def test_a_location_that_does_not_exist() -> None:
    refusals = supported_handle_types(HostDriver(), Location(numa_node=99))
    assert all(refusal is not None and "NUMA node 99" in refusal for refusal in refusals.values())
