"""In memory that is given back and taken again, and where there is none."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_SLEEP = "tests/multiprocess/test_sleep.py"
_ROOM = "tests/unit/test_out_of_memory.py"
_PROTOCOL = "tests/unit/group/test_agreement_protocol.py"

BUGS: Final = (
    Bug(
        "a shard that was saved before is not saved again",
        "vmm_dwdp/memory/sleep.py",
        "                    self._copy_saved(layer, weight, to_device=False)\n",
        "                        self._copy_saved(layer, weight, to_device=False)\n",
        (f"{_SLEEP}::test_an_update_between_is_what_comes_back",),
    ),
    Bug(
        "a shard begins at the first page of its range when it is saved",
        "vmm_dwdp/memory/sleep.py",
        "self._own[layer.number, weight].memory.at(span.start), window.at(0)",
        "self._own[layer.number, weight].memory.at(0), window.at(0)",
        (f"{_SLEEP}::test_every_byte_is_back_at_its_address",),
    ),
    Bug(
        "a rank that sleeps keeps what it has imported of others",
        "vmm_dwdp/memory/sleep.py",
        "                for tile in self._tiles.get(key, []):\n",
        "                for tile in self._tiles.get(key, []) if owner == self.rank else []:\n",
        (f"{_SLEEP}::test_no_rank_keeps_a_page_of_a_device",),
    ),
    Bug(
        "a rank lets go of others' pages before it has what they saved",
        "vmm_dwdp/group/sleep.py",
        """                    if keep:
                        self._take(exchange, owner, owner, deadline, ("host",))
                    assembly.drop(owner, "device")
""",
        """                    assembly.drop(owner, "device")
                    if keep:
                        self._take(exchange, owner, owner, deadline, ("host",))
""",
        (f"{_SLEEP}::test_a_rank_that_dies_takes_no_byte_with_it",),
    ),
    Bug(
        "a rank that could not wake keeps what it has taken",
        "vmm_dwdp/group/sleep.py",
        "                undo_after(error, assembly.give_back)\n",
        "                pass\n",
        (_ROOM,),
    ),
    Bug(
        "one rank updates while another sleeps, and both go on",
        "vmm_dwdp/group/agreement.py",
        " and not self.others_attempt\n",
        "\n",
        (f"{_SLEEP}::test_ranks_that_do_different_things_do_none",),
    ),
    Bug(
        "weights that were given up are read",
        "vmm_dwdp/group/agreement.py",
        "            self.doubt = GIVEN_UP\n        elif",
        "            self.doubt = None\n        elif",
        (f"{_SLEEP}::test_weights_that_were_given_up_are_read_once_all_are_written",),
    ),
    Bug(
        "to sleep takes away the doubt that an update has left",
        "vmm_dwdp/group/agreement.py",
        "        elif purpose not in _WRITES_NOTHING:\n            self.doubt = None\n",
        "        else:\n            self.doubt = None\n",
        (f"{_PROTOCOL}::test_who_writes_nothing_brings_nobody_into_doubt_nor_out_of_it",),
    ),
    Bug(
        "whoever is interrupted while the group sleeps goes on unasked",
        "vmm_dwdp/schedule/lifecycle.py",
        "self.runner = number if goes_on or runner == number else 0",
        "self.runner = number",
        (f"{_SLEEP}::test_a_call_that_is_interrupted_while_asleep_is_no_way_past_it",),
    ),
    Bug(
        "the cache that comes back reads its pages before they are filled",
        "vmm_dwdp/memory/cache.py",
        "        self._old = self._old or bool(before)\n",
        "        self._old = False\n",
        (f"{_SLEEP}::test_a_cache_that_cannot_be_filled_when_it_wakes_is_not_read",),
    ),
    Bug(
        "what torch keeps for later is not given back",
        "allocator/cuda_driver.py",
        "    torch.cuda.empty_cache()\n",
        "",
        ("tests/unit/allocator/test_cuda_calls.py",),
    ),
)
