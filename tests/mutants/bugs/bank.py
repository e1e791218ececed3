"""In the bank: who is in which row, and when the table says so."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_PLANNER = ("tests/unit/kernels/test_bank.py",)
_BYTES = ("tests/property/test_expert_bank.py",)
_STATES = ("tests/unit/test_bank_states.py",)

BUGS: Final = (
    Bug(
        "an expert that is read now leaves the bank",
        "kernels/bank.py",
        " + PINNED * (used & held)\n",
        " + 0 * PINNED * (used & held)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, an expert that is read now leaves the bank",
        "kernels/triton/bank.py",
        " + tl.where(used & held, PINNED, 0)\n",
        " + tl.where(used & held, 0, 0)\n",
        _PLANNER,
    ),
    Bug(
        "of a newcomer to the bank, its own use counts",
        "kernels/bank.py",
        "    past = table.scores.long() - ONE * (used & ~held)\n",
        "    past = table.scores.long() - 0 * (used & ~held)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, of a newcomer to the bank, its own use counts",
        "kernels/triton/bank.py",
        "    past = score - tl.where(used & ~held, ONE, 0)\n",
        "    past = score - tl.where(used & ~held, 0, 0)\n",
        _PLANNER,
    ),
    Bug(
        "copies into a bank are not paid for",
        "kernels/bank.py",
        "    table.credit.sub_(USES_A_COPY * len(leaving))\n",
        "    table.credit.sub_(USES_A_COPY * (len(leaving) > table.num_rows))\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, rows that nobody held are paid for",
        "kernels/triton/bank.py",
        "    tl.store(credit, saved - USES_A_COPY * num_leaving)\n",
        "    tl.store(credit, saved - USES_A_COPY * num_coming)\n",
        _PLANNER,
    ),
    Bug(
        "any number of copies is saved for later",
        "kernels/bank.py",
        ".clamp_(max=USES_A_COPY * table.num_rows)\n",
        ".clamp_(max=USES_A_COPY * USES_A_COPY * table.num_rows)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, any number of copies is saved for later",
        "kernels/triton/bank.py",
        "    saved = tl.minimum(saved, USES_A_COPY * num_rows)\n",
        "    saved = tl.minimum(saved, USES_A_COPY * USES_A_COPY * num_rows)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, more come than there are copies for",
        "kernels/triton/bank.py",
        "    coming = read & (row < 0) & (others < most) & (rank < num_rows)\n",
        "    coming = read & (row < 0) & (others <= most) & (rank < num_rows)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, newcomers are counted as if they were in the bank",
        "kernels/triton/bank.py",
        ", -1) >= 0, 1, 1 << 16)\n",
        ", -1) >= 0, 1, 1)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, all newcomers drive out",
        "kernels/triton/bank.py",
        "    rank = there + tl.minimum(others, most)\n",
        "    rank = there + others\n",
        _PLANNER,
    ),
    Bug(
        "an expert is said to be in the bank before its bytes are",
        "kernels/bank.py",
        "        for weight in weights:\n",
        "        table.rows[coming] = free[: len(coming)]\n        for weight in weights:\n",
        _PLANNER,
    ),
    Bug(
        "a form of a bank's kernels is compiled when it is first used",
        "vmm_dwdp/memory/bank.py",
        "itertools.product((torch.int32, torch.int64), (False, True))",
        "itertools.product((torch.int64,), (False, True))",
        _STATES,
    ),
    Bug(
        "own experts come into the bank",
        "kernels/bank.py",
        "    remote[table.own.start : table.own.stop] = False\n",
        "    remote[table.own.start : table.own.start] = False\n",
        _BYTES,
    ),
    Bug(
        "one weight of a layer is not copied",
        "kernels/bank.py",
        "        for weight in weights:\n",
        "        for weight in weights[:1]:\n",
        _BYTES,
    ),
    Bug(
        "in Triton, an expert that leaves is still said to be there",
        "kernels/triton/bank.py",
        "    return tl.where(coming, free, tl.where(leaving, -1, row)), num_coming\n",
        "    return tl.where(coming, free, row), num_coming\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, the last block of an expert is not copied",
        "kernels/triton/bank.py",
        "        blocks = tl.cdiv(words, BLOCK).to(tl.int32)\n",
        "        blocks = tl.maximum(words // BLOCK, 1).to(tl.int32)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, the planner changes the table before anything is copied",
        "kernels/triton/bank.py",
        "    tl.store(planned + experts, row, real)\n",
        "    tl.store(planned + experts, row, real)\n    tl.store(rows + experts, row, real)\n",
        _PLANNER,
    ),
    Bug(
        "in Triton, only the first ids of a pass are counted",
        "kernels/triton/bank.py",
        "    used = uses > 0\n",
        "    used = uses > 0 if num_ids <= IDS else experts < 0\n",
        _PLANNER,
    ),
    Bug(
        "the bank is not emptied before experts change",
        "vmm_dwdp/memory/bank.py",
        "            table.rows.fill_(-1)\n",
        "            table.scores.fill_(0)\n",
        _BYTES,
    ),
    Bug(
        "the bank's rows begin at the start of a page",
        "vmm_dwdp/layout/bank.py",
        "        return self.nbytes - self.num_rows * self.in_place.expert_nbytes\n",
        "        return 0 * self.num_rows\n",
        _BYTES,
    ),
    Bug(
        "a layer may be looked up twice",
        "vmm_dwdp/schedule/in_place.py",
        "        if layer.looked_up:\n            raise",
        "        if layer.looked_up and False:\n            raise",
        _STATES,
    ),
    Bug(
        "a pass on another stream does not wait",
        "vmm_dwdp/schedule/in_place.py",
        "        if eager and self._reader not in (None, stream):\n",
        "        if eager and self._reader not in (None, stream) and not chosen.is_cpu:\n",
        _STATES,
    ),
    Bug(
        "a bank keeps its memory in sleep",
        "vmm_dwdp/memory/sleep.py",
        "            self.bank.give_back()\n",
        "            self.bank.num_handles\n",
        _STATES,
    ),
    Bug(
        "rows of a bank are not compared",
        "vmm_dwdp/memory/bank.py",
        "                    if not torch.equal(as_bytes[row], as_bytes[table.num_rows + expert]):\n",
        "                    if not torch.equal(as_bytes[row], as_bytes[row]):\n",
        _STATES,
    ),
)
