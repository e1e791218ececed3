"""Finding out how memory can be handed to another process, by trying it."""

from __future__ import annotations

from vmm_dwdp.allocator.driver import DEVICE, Driver, HandleType, Location
from vmm_dwdp.allocator.handles import Allocation, Descriptor, Ledger, ResourceStack
from vmm_dwdp.errors import DriverError


def supported_handle_types(driver: Driver, location: Location = DEVICE) -> dict[HandleType, str | None]:
    """For each handle type None if memory at ``location`` can be shared by it, else the sentence that says why not.

    One page is created, exported and imported back: a driver may accept a handle type and fail only when it exports.
    """
    return {handle_type: _refusal(driver, location, handle_type) for handle_type in HandleType}


def _refusal(driver: Driver, location: Location, handle_type: HandleType) -> str | None:
    ledger = Ledger()
    try:
        with ResourceStack() as stack:
            nbytes = driver.granularity(location)
            page = stack.push(Allocation.create(driver, ledger, nbytes, location, handle_type))
            shared = page.export(handle_type)
            if isinstance(shared, Descriptor):
                stack.push(shared)
            stack.push(Allocation.import_(driver, ledger, shared, handle_type, nbytes))
    except DriverError as error:
        return str(error)
    return None
