"""In which order products go through experts."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_LABELS = ("tests/unit/kernels/test_relabel.py",)
_BLOCKS = ("tests/unit/integrations/test_sglang_block_order.py",)
_PLACEMENT = ("tests/property/test_placement_and_layout.py",)

BUGS: Final = (
    Bug(
        "what nobody wrote is taken for a number that has a label",
        "kernels/relabel.py",
        "known = (numbers >= 0) & (numbers < len(labels))",
        "known = (numbers >= 0) & (numbers <= len(labels))",
        _LABELS,
    ),
    Bug(
        "in Triton, what nobody wrote is taken for a number that has a label",
        "kernels/triton/relabel.py",
        "known = (number >= 0) & (number < num_labels)",
        "known = number < num_labels",
        _LABELS,
    ),
    Bug(
        "blocks are told the places of their experts",
        "vmm_dwdp/integrations/sglang/block_order.py",
        "return token_ids, relabel(expert_ids, order), num_padded",
        "return token_ids, expert_ids, num_padded",
        _BLOCKS,
    ),
    Bug(
        "layers with other numbers of experts are sorted in this order, too",
        "vmm_dwdp/integrations/sglang/block_order.py",
        "if num_experts not in self._tables:\n            return",
        "if not self._tables:\n            return",
        _BLOCKS,
    ),
    Bug(
        "what is copied ahead is sorted by owners, too",
        "vmm_dwdp/integrations/sglang/manager.py",
        "self._order if in_place else None",
        "self._order",
        _BLOCKS,
    ),
    Bug(
        "nobody sorts by owners",
        "vmm_dwdp/integrations/sglang/manager.py",
        "            self._order = self._block_order()\n",
        "            self._block_order()\n",
        _BLOCKS,
    ),
    Bug(
        "Marlin's blocks are sorted by owners",
        "vmm_dwdp/integrations/sglang/manager.py",
        " or runners != BlockOrder.RUNNERS",
        "",
        _BLOCKS,
    ),
    Bug(
        "all ranks begin with the same owner",
        "vmm_dwdp/layout/placement.py",
        "owners = nearest_first(runs, reader, self.config.group_size)\n        turns",
        "owners = nearest_first(runs, 0, self.config.group_size)\n        turns",
        _BLOCKS,
    ),
    Bug(
        "one owner's turns come all at once",
        "vmm_dwdp/layout/placement.py",
        "((2 * place + 1) / len(runs[owner]), turn, expert)",
        "(turn, place, expert)",
        (*_PLACEMENT, *_BLOCKS),
    ),
)
