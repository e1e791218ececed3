"""In experts that change places."""

from __future__ import annotations

from typing import Final

from mutants.seeded import Bug

_MOVES = "tests/multiprocess/test_rebalance.py"
_DEATHS = "tests/multiprocess/test_rebalance_deaths.py"
_BALANCE = "tests/property/test_balance.py"
_SEQUENCE = f"{_MOVES}::test_every_expert_after_any_sequence_of_swaps_and_updates"
_LATEST = f"{_DEATHS}::test_what_was_being_moved_has_to_be_written_whole"

BUGS: Final = (
    Bug(
        "what is looked up is not mapped to where experts are",
        "vmm_dwdp/schedule/in_place.py",
        "        if self._movable:\n            with",
        "        if self._movable and self._bank is not None:\n            with",
        ("tests/multiprocess/test_rebalance.py",),
    ),
    Bug(
        "an expert that moves is read of the row that it comes to",
        "vmm_dwdp/group/rebalance.py",
        "source = before.rows_of(layer)[now[row]]",
        "source = after.rows_of(layer)[now[row]]",
        (_SEQUENCE,),
    ),
    Bug(
        "each rank makes as many swaps as it states itself",
        "vmm_dwdp/group/rebalance.py",
        "most = min(most, *",
        "_ = min(most, *",
        (f"{_MOVES}::test_the_least_that_a_rank_allows_is_moved",),
    ),
    Bug(
        "experts leave host memory",
        "vmm_dwdp/layout/balance.py",
        "differ = self._movable[rows] & self._movable[others] & (self._kinds",
        "differ = (self._kinds",
        (f"{_BALANCE}::test_nobody_is_lost_and_no_owner_is_busier_than_the_busiest_was",),
    ),
    Bug(
        "what a rank reads of its own memory counts as of its link",
        "vmm_dwdp/layout/balance.py",
        "if source not in (reader, HOST):",
        "if source != HOST:",
        (f"{_BALANCE}::test_swaps_are_those_that_relieve_most",),
    ),
    Bug(
        "tables on the device stay as they were",
        "vmm_dwdp/memory/expert_tables.py",
        "self._tables[layer.number].copy_(torch.tensor(order.rows_of(layer)))",
        "order.rows_of(layer)",
        (_SEQUENCE,),
    ),
    Bug(
        "a cache takes experts for rows",
        "vmm_dwdp/schedule/in_place.py",
        "by_row(layer, counts[layer.number])",
        "counts[layer.number]",
        (f"{_MOVES}::test_a_cache_goes_by_where_experts_are",),
    ),
    Bug(
        "what one reader has seen of the routing is new to no other",
        "vmm_dwdp/schedule/routing_counts.py",
        "        self._seen[reader] = self._total\n",
        '        self._seen = dict.fromkeys(("cache", "rebalance"), self._total)\n',
        ("tests/unit/schedule/test_routing_counts.py",),
    ),
    Bug(
        "a move that broke off leaves nothing to be written",
        "vmm_dwdp/group/update.py",
        "self.begun.update(key for key in self.held() if key[0] in changed and key[2] != HOST)",
        "del changed",
        (_LATEST,),
    ),
    Bug(
        "an update goes by where a rank took experts to be before",
        "vmm_dwdp/group/membership.py",
        "moved or latest_order(self._exchange, tables.order, self._layers, deadline)",
        "moved or tables.order",
        (_LATEST,),
    ),
    Bug(
        "a rank that comes back takes experts to be in order",
        "vmm_dwdp/group/membership.py",
        "            self._assembly.tables.change(order_of(exchange, holder, self._layers, deadline))\n",
        "            order_of(exchange, holder, self._layers, deadline)\n",
        (f"{_MOVES}::test_a_rank_that_comes_back_learns_where_experts_are",),
    ),
    Bug(
        "who moves experts is in no doubt",
        "vmm_dwdp/group/agreement.py",
        '("settle", "sleep", "wake", "rebalance")',
        '("settle", "sleep", "wake", "rebalance", "move")',
        (
            "tests/unit/group/test_agreement_protocol.py::test_who_writes_nothing_brings_nobody_into_doubt_nor_out_of_it",
        ),
    ),
    Bug(
        "a whole shard is written in the order of rows",
        "vmm_dwdp/group/update.py",
        "            if not isinstance(held, range):\n                raise",
        "            if False:\n                raise",
        (f"{_MOVES}::test_once_moved_a_whole_shard_has_no_order",),
    ),
    Bug(
        "experts move although nobody asks where they are",
        "vmm_dwdp/together.py",
        "            self._assembly.tables.require_asked()\n",
        "",
        (f"{_MOVES}::test_passes_without_a_table_are_refused",),
    ),
    Bug(
        "a rank that came back reads before it asks where experts are",
        "vmm_dwdp/group/membership.py",
        "        self._assembly.tables.require_told()\n",
        "",
        (f"{_MOVES}::test_a_rank_that_comes_back_learns_where_experts_are",),
    ),
    Bug(
        "a transformers module is given experts for rows",
        "vmm_dwdp/integrations/transformers/routing.py",
        "chosen if each is routed.chosen else each",
        "each",
        ("tests/unit/integrations/test_transformers_moved.py::test_logits_stay_whoever_holds_an_expert",),
    ),
)
