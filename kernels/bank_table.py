"""Which experts a bank of rows holds, planned where the router's choice is: on the device, for every pass anew.

[Note: The planner]
A layer has a bank of ``S`` rows before the ``E`` experts that its tensors have in place: ``[S + E, ...]``. A table on
the device says which expert is in which row. `look_up` is given what the router chose, and works out, without the host:

1. how often each expert was used lately: a score that is halved every `HALF_LIFE` passes, and gains one for a pass that
   uses the expert. It is an integer, so that every device works out the same.
2. who is to be in the bank: of the experts that are there and of the newcomers, which were just used and are not there,
   the ``S`` of the highest score; of equal ones the lower number. A newcomer's score is the one before this pass, so
   that it takes the row of another for earlier uses only: a copy is worth its time if the expert is used again, and one
   use says little of that. What is there and was just used stays in any case, as it is read now.
3. how many may come. Rows that nobody holds are given to whom there is room for. For the rows of others a bank has
   credit: each use of an expert that is not this device's own is worth a copy's ``1 / USES_A_COPY``, and what is not
   spent is kept for later, up to ``S`` copies. Of the newcomers only as many of the highest scores take part as there
   are free rows and copies. So whatever is chosen, a bank that never hits copies no more than that part of what it
   reads.
4. who goes into which row. As long as the bank is not full nobody leaves, and rows are taken in their order: the rows
   in use are always the first. Who comes takes the row of somebody who leaves, or the next.
5. for every chosen expert the row in which it is read: in the bank, or ``S + e`` where it is in place.

Then those who come are copied into their rows, from where they are in place, by as many programs as the device has
multiprocessors; the product that follows on the same stream reads them there. So what is not in the bank crosses the
link once, whether it comes into the bank or not. Where nobody is to be copied, who is in the bank is only read.

That frequency decides who is admitted, and not only who leaves, is of Einziger, Friedman and Manes, TinyLFU: A Highly
Efficient Cache Admission Policy (arXiv 1512.00727). The credit is what networks call a token bucket.

The table says of an expert that it is in a row only once its bytes are there: `look_up` reads the table and writes a
plan, and what copies the rows then makes the plan the table. Where one was launched and the other not, table and rows
are as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vmm_dwdp.errors import ConfigError

HALF_LIFE: Final = 16  # passes after which a use counts half: at most sizes the best of those in docs/routing.md
USES_A_COPY: Final = 8  # for each of so many uses one expert may take another's row
ONE: Final = 1 << 24  # what a use counts in the pass that makes it
DECAY: Final = round(2 ** (16 - 1 / HALF_LIFE))  # of 2**16, what is left of a score from pass to pass
MOST_EXPERTS: Final = 4096  # of a layer, which one program of the planner goes through
PINNED: Final = 1 << 60  # more than the key of any expert that may leave: its score times 2**16, less its number


@dataclass(frozen=True, eq=False)
class BankTable:
    """What the device knows of a layer's bank; see [Note: The planner].

    Attributes:
        num_rows: ``S``.
        own: the experts that are read in place in any case, as they are this device's own.
        rows: int32 ``[E]``, the row of each expert in the bank, or -1.
        planned: int32 ``[E]``, the same once the experts in ``moves`` are copied.
        scores: int32 ``[E]``, how often it was used lately.
        credit: int64 ``[1]``, uses that no copy was made for yet.
        moves: int32 ``[1 + S]``, how many experts are to be copied, and which.
        counts: int64 ``[3]``, since the table was made: uses of experts that are not this device's own, each once a
            pass; of these, those that were in the bank; and experts that were copied into it.
        scratch: int64 ``[E]``.
    """

    num_rows: int
    own: range
    rows: Tensor
    planned: Tensor
    scores: Tensor
    credit: Tensor
    moves: Tensor
    counts: Tensor
    scratch: Tensor

    @classmethod
    def empty(cls, num_experts: int, num_rows: int, own: range, device: torch.device) -> BankTable:
        """The table of an empty bank. Raises `ConfigError` if there are too many experts."""
        if num_experts > MOST_EXPERTS:
            raise ConfigError(f"a bank is planned for up to {MOST_EXPERTS} experts of a layer, not for {num_experts}")
        with torch.inference_mode(False):  # what is made in that mode can be written to only in that mode
            return cls(
                num_rows,
                own,
                rows=torch.full((num_experts,), -1, dtype=torch.int32, device=device),
                planned=torch.full((num_experts,), -1, dtype=torch.int32, device=device),
                scores=torch.zeros(num_experts, dtype=torch.int32, device=device),
                credit=torch.zeros(1, dtype=torch.int64, device=device),
                moves=torch.zeros(1 + num_rows, dtype=torch.int32, device=device),
                counts=torch.zeros(3, dtype=torch.int64, device=device),
                scratch=torch.zeros(num_experts, dtype=torch.int64, device=device),
            )

    @property
    def num_experts(self) -> int:
        """``E``."""
        return len(self.rows)
