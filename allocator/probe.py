"""Finding out how memory can be handed to another process, by trying it."""

from __future__ import annotations

import contextlib

from vmm_dwdp.allocator.driver import DEVICE, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Descriptor, Ledger, ResourceStack
from vmm_dwdp.errors import DriverError


def supported_handle_types(driver: Driver, location: Location = DEVICE) -> dict[HandleType, str | None]:
    """For each handle type None if memory at ``location`` can be shared by it, else the sentence that says why not.

    One page is created, exported and imported back: a driver may accept a handle type and fail only when it exports.
    """
    return {handle_type: refusal(driver, location, handle_type) for handle_type in HandleType}


def refusal(driver: Driver, location: Location, handle_type: HandleType) -> str | None:
    """Why memory at ``location`` cannot be shared by ``handle_type``, or None if it can."""
    ledger = Ledger()
    stack = ResourceStack()
    try:
        nbytes = driver.granularity(location)
        page = stack.push(Allocation.create(driver, ledger, nbytes, location, handle_type))
        shared = page.export(handle_type)
        if isinstance(shared, Descriptor):
            stack.push(shared)
        stack.push(Allocation.import_(driver, ledger, shared, handle_type, nbytes))
    except DriverError as error:
        return str(error)
    finally:
        with contextlib.suppress(DriverError):
            stack.close()
        stack.close()  # what could not be undone is tried once more, as nobody else knows of it
    return None
