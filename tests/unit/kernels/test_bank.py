"""The planner of a bank, on the CPU and in Triton, interpreted and compiled, against a model of plain sets."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bank_model import SAVING, BankModel
from support.triton_scripts import python

from vmm_dwdp.errors import ConfigError
from vmm_dwdp.kernels.bank import look_up
from vmm_dwdp.kernels.bank_table import MOST_EXPERTS, BankTable
from vmm_dwdp.planning.caches import bank_policy, replay
from vmm_dwdp.planning.routing import read_trace, used_experts

CPU = torch.device("cpu")
TRACES = Path(__file__).parents[3] / "benchmarks" / "traces"

# Passes through one bank after another, by the Triton kernels: what they say, and what the rows of the bank hold then.
TRITON = """
import json, sys, torch
from vmm_dwdp.kernels.bank_table import BankTable
from vmm_dwdp.kernels.triton.bank import move, plan

for case in json.loads(sys.stdin.read()):
    table = BankTable.empty(case["experts"], case["rows"], range(*case["own"]), torch.device("cpu"))
    weights = [torch.zeros(case["rows"] + case["experts"], size, dtype=torch.uint8) for size in case["sizes"]]
    for weight in weights:
        weight[case["rows"] :] = torch.arange(weight[case["rows"] :].numel()).view(case["experts"], -1) % 251
    told = []
    for chosen, copies in case["passes"]:
        ids = torch.tensor(chosen, dtype=getattr(torch, case["dtype"]))
        before = table.rows.tolist()
        places = plan(table, ids, copies=copies)
        assert table.rows.tolist() == before, "the planner has changed the table, and nothing is copied yet"
        if copies:
            move(table, weights, programs=case["programs"])
        told.append([places.tolist(), table.rows.tolist(), table.counts.tolist()])
        held = [(expert, row) for expert, row in enumerate(table.rows.tolist()) if row >= 0]
        for weight in weights:
            assert all(torch.equal(weight[row], weight[case["rows"] + expert]) for expert, row in held)
    print(json.dumps(told))
"""

COMPILE = """
import json, sys, torch
from support.triton_scripts import compile_for
from vmm_dwdp.kernels.bank_table import BankTable
from vmm_dwdp.kernels.triton import bank

class Compile:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def compiled(*arguments, **options):
            print(json.dumps(len(self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"])))
        return compiled

bank._plan, bank._move = Compile(bank._plan), Compile(bank._move)
compile_for(int(sys.argv[1]))
for experts in (60, 512):
    table = BankTable.empty(experts, 5, range(0), torch.device("cpu"))
    for dtype, copies in ((torch.int32, True), (torch.int64, True), (torch.int64, False)):
        bank.plan(table, torch.zeros(3, 2, dtype=dtype), copies=copies)
    for size in (64, 3, 8):  # of one word, too
        bank.move(table, [torch.zeros(5 + experts, size, dtype=torch.uint8)], programs=1)
"""


def routed(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> list[list[int]]:
    """Experts of each token, with favourites; now and then one that is none, as padding has."""
    favour = torch.rand(experts, generator=generator) ** 4 + 1e-9
    chosen = torch.multinomial(favour.expand(tokens, -1), top_k, generator=generator)
    strange = torch.randint(0, 12, chosen.shape, generator=generator)
    return torch.where(strange == 0, -1, torch.where(strange == 1, experts + 3, chosen)).tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_pass_is_planned_as_the_model_plans_it(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 40))
    rows = data.draw(st.integers(1, experts))
    start = data.draw(st.integers(0, experts))
    own = range(start, data.draw(st.integers(start, experts)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    table, model = BankTable.empty(experts, rows, own, CPU), BankModel(experts, rows, own)
    weights = [torch.rand(rows + experts, size, generator=generator) for size in (3, 8)]
    owned = [weight[rows:].clone() for weight in weights]
    for tokens, copies in data.draw(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20)):
        chosen = torch.tensor(routed(tokens, min(experts, 3), experts, generator), dtype=dtype).view(
            tokens, min(experts, 3)
        )
        places = look_up(table, chosen, weights, copies=copies)
        assert places.dtype == dtype
        assert places.flatten().tolist() == model.look_up(chosen.flatten().tolist(), copies=copies)
        assert {expert: row for expert, row in enumerate(table.rows.tolist()) if row >= 0} == model.row_of
        assert table.counts.tolist() == model.counts
        read = (places >= 0).flatten()
        for weight, whole in zip(weights, owned, strict=True):
            assert torch.equal(weight[places.flatten()[read].long()], whole[chosen.flatten()[read].long()])
            assert torch.equal(weight[rows:], whole)


def test_triton_plans_and_copies_as_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for experts, rows, own, tokens, sizes, dtype in (
        (16, 4, (0, 0), 1, [48, 32], "int64"),
        (40, 10, (5, 9), 3, [16 * 1024 + 16, 8, 5], "int32"),  # more than a block, and what only fits by bytes
        (7, 7, (0, 0), 2, [4], "int64"),
        (130, 13, (0, 100), 4, [6], "int32"),
        (300, 20, (100, 200), 90, [16], "int64"),  # more ids than a step of the planner has
    ):
        passes = [(routed(tokens, min(experts, 7), experts, generator), number % 4 != 3) for number in range(9)]
        stated = {"experts": experts, "rows": rows, "own": own, "sizes": sizes, "dtype": dtype, "programs": 3}
        cases.append(stated | {"passes": passes})
    saving = [([used], True) for used in SAVING]
    cases.append(
        {"experts": 12, "rows": 4, "own": (0, 0), "sizes": [8], "dtype": "int32", "programs": 2, "passes": saving}
    )
    for case, told in zip(cases, python(TRITON, given=cases, TRITON_INTERPRET="1"), strict=True):
        model = BankModel(case["experts"], case["rows"], range(*case["own"]))
        for (chosen, copies), (places, rows, counts) in zip(case["passes"], told, strict=True):
            flat = [expert for token in chosen for expert in token]
            assert [place for token in places for place in token] == model.look_up(flat, copies=copies)
            assert {expert: row for expert, row in enumerate(rows) if row >= 0} == model.row_of
            assert counts == model.counts
        assert model.counts[2] > case["rows"] or case["rows"] == case["experts"], "nobody has left the bank"


def test_what_is_there_and_is_used_now_stays_though_another_was_used_more() -> None:
    """Expert 1 was used more, in passes that copied nothing; it comes once expert 0 is not used."""
    passes = [*[([[0]], True)] * 7, *[([[1]], False)] * 12, ([[0, 1]], True), ([[1]], True)]
    held = [[0, -1]] * 20 + [[-1, 0]]
    case = {"experts": 2, "rows": 1, "own": (0, 0), "sizes": [16], "dtype": "int64", "programs": 1, "passes": passes}
    (told,) = python(TRITON, given=[case], TRITON_INTERPRET="1")
    assert [rows for _, rows, _ in told] == held
    table = BankTable.empty(2, 1, range(0), CPU)
    for (chosen, copies), rows in zip(passes, held, strict=True):
        look_up(table, torch.tensor(chosen), [], copies=copies)
        assert table.rows.tolist() == rows


def chosen_by(data: st.DataObject, experts: int) -> list[list[int]]:
    """What passes use: some few experts again and again, or others each time."""
    some = st.lists(st.integers(0, experts - 1), min_size=1, max_size=min(experts, 12), unique=True)
    repeated = st.tuples(some, st.integers(1, 6)).map(lambda drawn: [drawn[0]] * drawn[1])
    return [used for several in data.draw(st.lists(repeated, max_size=30)) for used in several]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_only_what_was_used_lately_takes_a_row_and_for_eight_uses_one_does(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 40))
    rows = data.draw(st.integers(1, experts))
    table = BankTable.empty(experts, rows, range(0), CPU)
    last: dict[int, int] = {}
    exchanged, uses, earned = 0, 0, []
    for number, used in enumerate(chosen_by(data, experts)):
        before = {expert for expert, row in enumerate(table.rows.tolist()) if row >= 0}
        look_up(table, torch.tensor([used]), [], copies=True)
        after = {expert for expert, row in enumerate(table.rows.tolist()) if row >= 0}
        assert before & set(used) <= after
        assert len(after) == min(rows, len(before | set(used))), "a row that nobody holds is given to who comes"
        if left := before - after:
            came = sorted(after - before, key=lambda expert: last.get(expert, -1))
            assert all(expert in last for expert in came[rows - len(before) :]), "of others, only what was used before"
            exchanged += len(left)
        uses += len(used)
        last |= dict.fromkeys(used, number)
        earned.append(uses - 8 * exchanged)
    assert all(saved >= 0 for saved in earned)
    # Between any two passes no more than was earned meanwhile, and what may be saved.
    assert all(now >= most - 8 * rows for most, now in zip(accumulate(earned, max), earned, strict=True))


def test_no_more_copies_are_saved_than_there_are_rows() -> None:
    table, model = BankTable.empty(12, 4, range(0), CPU), BankModel(12, 4)
    for used in SAVING:
        assert look_up(table, torch.tensor([used]), [], copies=True).tolist() == [model.look_up(used, copies=True)]
    assert table.counts.tolist() == model.counts


def test_where_an_expert_comes_back_only_after_all_others_none_takes_a_row() -> None:
    table = BankTable.empty(128, 32, range(0), CPU)
    for number in range(200):
        look_up(table, (torch.arange(8) + 8 * number)[None] % 128, [], copies=True)
    uses, hits, copied = table.counts.tolist()
    assert (uses, copied) == (1600, 32)
    assert hits == pytest.approx((uses - 128) / 4, abs=32)


class Interrupted:
    """A weight of which nothing is copied any more."""

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def test_an_interrupted_copy_leaves_no_expert_in_a_row_that_has_not_its_bytes() -> None:
    table = BankTable.empty(4, 2, range(0), CPU)
    weight = torch.arange(2 + 4)
    for chosen, copies in [([[0, 1]], True)] * 7 + [([[2, 3]], False)] * 9:
        look_up(table, torch.tensor(chosen), [weight], copies=copies)
    weights: list[Any] = [Interrupted(), weight]
    with pytest.raises(KeyboardInterrupt):
        look_up(table, torch.tensor([[2, 3]]), weights, copies=True)
    assert all(weight[row] == weight[2 + expert] for expert, row in enumerate(table.rows.tolist()) if row >= 0)
    assert table.rows.tolist() != [0, 1, -1, -1], "the copy was not begun"
    assert look_up(table, torch.tensor([[2, 3]]), [weight], copies=True).tolist() == [[0, 1]]
    assert weight.tolist() == [4, 5, 2, 3, 4, 5]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile(capability: int) -> None:
    assert len(python(COMPILE, str(capability))) == 2 * 6


def test_a_plan_that_nobody_carries_out_changes_nothing_that_is_read() -> None:
    """The next one is made from the same table; what was not copied is not said to be there."""
    passes = [*[[[[0, 1]], True]] * 7, *[[[[2, 3]], False]] * 9, [[[2, 3]], None], *[[[[0, 3]], True]] * 4]
    script = TRITON.replace("if copies:\n            move", "if copies is True:\n            move")
    assert script != TRITON
    script = script.replace("copies=copies)\n        assert", "copies=copies is not False)\n        assert")
    script = script.replace("told.append([", "told.append([table.moves.tolist(), ")
    case = {"experts": 4, "rows": 2, "own": (0, 0), "sizes": [16], "dtype": "int64", "programs": 1, "passes": passes}
    (told,) = python(script, given=[case], TRITON_INTERPRET="1")
    lost, after, last = told[16], told[17], told[-1]
    assert lost[0] == [2, 2, 3], "two experts were to come"
    assert lost[2] == [0, 1, -1, -1]
    assert after[1:3] == [[[0, 2 + 3]], [0, 1, -1, -1]], "their copies are paid for"
    assert last[1:3] == [[[0, 1]], [0, -1, -1, 1]]


@pytest.mark.parametrize("room", [16, 32])
def test_hits_of_recorded_routing_are_those_of_the_replay(room: int) -> None:
    """But that scores are integers here."""
    trace = read_trace(TRACES / "mixed-0.01.npz")
    hits, uses, copied, expected = 0, 0, 0, np.zeros(2, np.int64)
    for sequence, layer in ((0, 3), (9, 0), (20, 9)):
        chosen = trace.decode[sequence, :, layer]
        used = used_experts(chosen, trace.num_experts)[:, None]
        found = replay(used, room, bank_policy)
        expected += found.hits.sum(), found.copies.sum()
        table = BankTable.empty(trace.num_experts, room, range(0), CPU)
        for token in torch.from_numpy(chosen.astype("int64")):
            look_up(table, token[None], [], copies=True)
        uses, hits, copied = (sum(both) for both in zip((uses, hits, copied), table.counts.tolist(), strict=True))
    assert uses == 3 * 128 * 8
    assert [hits, copied] == pytest.approx(expected, rel=2e-3)


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="planned for up to 4096 experts of a layer, not for 4097"):
        BankTable.empty(MOST_EXPERTS + 1, 1, range(0), CPU)
