"""benchmarks/versus_offloaders.py: what is run, what is counted, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import offloaders
import versus_offloaders
from cuts import SIGNALS, Cut, raise_when_cut
from decode import SHAPES
from findings import Findings

from vmm_dwdp.planning.routing import read_trace

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SHAPE = SHAPES["tiny"]._replace(top_k=4, layers=3)
EXPERT = 3 * 256 * 128 * 2  # bytes
STEPS = 2


def measured(
    *offered: offloaders.Offloader,
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
    whose: tuple[str, ...] = ("ours",),
) -> Any:
    """The rows and who is left out, with these offloaders for theirs; also of what was cut."""
    monkeypatch.setattr(versus_offloaders, "available", lambda kinds, device: (list(offered), {}))
    arguments = argparse.Namespace(device=CPU, rivals=whose, tokens=tokens, steps=STEPS, tiny=True)
    told: list[Findings] = []
    try:
        versus_offloaders.measure(SHAPE, arguments, told.append)
    except Cut:
        assert told, "what was found is told before anything else"
    (found,) = told
    return found.rows, found.left_out


def offloader(name: str, change: Callable[[nn.Module], None] = lambda layer: None) -> offloaders.Offloader:
    def offload(layers: list[nn.Module]) -> offloaders.Offloaded:
        for layer in layers:
            change(layer)
        return offloaders.Offloaded(layers)

    return offloaders.Offloader(name, offload, "all", ahead=True, on_cpu=True)


def test_each_is_compared_by_what_its_pass_has_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, left_out = measured(offloader("theirs"), tokens=[1, 4, 40], monkeypatch=monkeypatch)
    by = {(row["who"], row["tokens"]): row for row in rows}
    demo = read_trace(ROOT / "benchmarks" / "traces" / "demo.npz").mixed()

    assert left_out == {}
    ours = [("ours, in place", 1), ("ours, in place", 4), ("ours, bank", 1), ("ours, bank", 4), ("ours, staged", 40)]
    assert list(by) == [*ours, *(("theirs", tokens) for tokens in (1, 4, 40))]
    for tokens in 1, 4:
        chosen = demo.decode[:tokens, -STEPS:, : SHAPE.layers]
        used = [len(set(chosen[:, step, layer].flatten())) for step in range(STEPS) for layer in range(SHAPE.layers)]
        in_place, bank, theirs = (by[who, tokens] for who in ("ours, in place", "ours, bank", "theirs"))
        assert in_place["used GB"] == in_place["moved GB"] == theirs["used GB"] == sum(used) / STEPS * EXPERT / 1e9
        assert bank["moved GB"] < in_place["moved GB"], "the prompts and other steps have filled the bank"
        assert theirs["moved GB"] == SHAPE.layers * 16 * EXPERT / 1e9
    for row in rows:
        assert row["same bits"] is True
        least = max(row["gpu ms"], row["moved GB"] / row["link"] * 1e3)
        assert row["over own"] == pytest.approx(row["ms"] / least)
        assert row["over bound"] == pytest.approx(row["ms"] / max(row["gpu ms"], row["used GB"] / row["link"] * 1e3))
        assert (row["ours / it"] == 1) == (row["who"] in ("ours, bank", "ours, staged"))


def test_what_crosses_with_a_bank_is_what_no_step_used_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has room for all, and nothing filled it."""
    ids = torch.cat(next(versus_offloaders.tokens_of("demo", SHAPE, 2)))[:3]
    setting = versus_offloaders.Setting(2, "demo", versus_offloaders.our_gemm, ids[:0], ids)
    monkeypatch.setattr(versus_offloaders, "settings", lambda shape, arguments: [setting])
    rows, _ = measured(tokens=[], monkeypatch=monkeypatch)
    moved = {row["who"]: row["moved GB"] for row in rows}
    first = sum(len(set(ids[:, layer].flatten().tolist())) for layer in range(SHAPE.layers))

    assert moved["ours, bank"] == pytest.approx(first * EXPERT / len(ids) / 1e9)
    assert moved["ours, in place"] > moved["ours, bank"]


def test_another_output_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(layer: nn.Module) -> None:
        for weight in layer.parameters():
            weight.data[3] += 1

    with pytest.raises(SystemExit, match="spoilt gives another output than the layers on the GPU"):
        measured(offloader("spoilt", spoil), tokens=[4], monkeypatch=monkeypatch)


def test_who_cannot_run_is_left_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: nn.Module) -> None:
        raise RuntimeError("pinned memory is not to be had\nand more of it")

    offered = offloader("failing", fail), offloader("theirs")
    rows, left_out = measured(*offered, tokens=[1], monkeypatch=monkeypatch)

    assert left_out == {"failing": "pinned memory is not to be had"}
    assert [row["who"] for row in rows] == ["ours, in place", "ours, bank", "theirs"]


def test_what_was_measured_of_who_fails_later_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, left_out = measured(at_four_tokens("failing", fail), tokens=[1, 4], monkeypatch=monkeypatch, whose=())

    assert [(row["who"], row["tokens"]) for row in rows] == [("failing", 1)]
    assert left_out == {"failing": "no more"}


def fail() -> None:
    raise RuntimeError("no more")


def at_four_tokens(name: str, do: Callable[[], None]) -> offloaders.Offloader:
    """An offloader that does this in a pass of four tokens."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) == 4:
            do()

    return offloader(name, lambda layer: layer.register_forward_pre_hook(hook))


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def cutting() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    raise_when_cut()
    yield
    after = {signal.signal(each, handler) for each, handler in before.items()}
    assert after == {signal.SIG_IGN}, "what is told then is not cut again"


@pytest.mark.usefixtures("cutting")
def test_who_is_cut_keeps_what_was_measured_and_says_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = offloader("first"), at_four_tokens("cut", sigterm), offloader("never")
    rows, left_out = measured(*offered, tokens=[1, 4, 40], monkeypatch=monkeypatch)

    assert [(row["who"], row["tokens"]) for row in rows[-4:]] == [("first", 1), ("first", 4), ("first", 40), ("cut", 1)]
    assert {str(row["who"]) for row in rows[:-4]} == {"ours, in place", "ours, bank", "ours, staged"}
    assert left_out == {
        "cut": "the run was cut before its passes of 4, 40 tokens",
        "never": "the run was cut before its passes of 1, 4, 40 tokens",
    }


@pytest.mark.usefixtures("cutting")
def test_a_command_that_is_cut_prints_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def available(kinds: list[str], device: torch.device) -> tuple[list[offloaders.Offloader], dict[str, str]]:
        asked.append(kinds)
        return [at_four_tokens("theirs", sigterm)], {"vllm": "not there"}

    monkeypatch.setattr(versus_offloaders, "available", available)
    words = [
        "--tiny",
        "--tokens",
        "1",
        "4",
        "--steps",
        "2",
        "--json",
        "--device",
        "cpu",
        "--rivals",
        "vllm",
        "accelerate",
    ]
    monkeypatch.setattr(sys, "argv", ["versus_offloaders.py", *words])
    with pytest.raises(Cut, match="cut by SIGTERM"):
        versus_offloaders.main()
    _, rows, left_out = json.loads(capsys.readouterr().out).values()

    assert asked == [["vllm", "accelerate"]]
    assert [(row["who"], row["tokens"], row["graph"]) for row in rows] == [("theirs", 1, None)]
    assert left_out == [
        {"who": "vllm", "why": "not there"},
        {"who": "theirs", "why": "the run was cut before its passes of 4 tokens"},
    ]


@pytest.mark.parametrize(("ms", "link"), [(95.0, 50.0), (float("nan"), 50.0), (200.0, float("nan")), (200.0, -50.0)])
def test_a_pass_that_is_shorter_than_its_bytes_is_refused(ms: float, link: float) -> None:
    versus_offloaders.require_possible({"ms": 96.0, "moved GB": 5.0, "link": 50.0})
    versus_offloaders.require_possible({"ms": 0.1, "moved GB": 0.0, "link": 50.0})
    with pytest.raises(SystemExit, match="cannot be: what it moves takes"):
        versus_offloaders.require_possible({"ms": ms, "moved GB": 5.0, "link": link})


def test_without_a_gpu_accelerate_runs_and_others_say_what_they_need() -> None:
    pytest.importorskip("accelerate")
    found, left_out = offloaders.available(["vllm", "accelerate"], CPU)

    assert [each.moves for each in found] == ["all"]
    assert left_out == {"vllm": "No module named 'vllm.model_executor.offloader'"}
    weights = {"w13": torch.randn(4, 6, 5), "w2": torch.randn(4, 5, 3)}
    done = found[0].offload([offloaders.DecoderLayer(weights)])
    seen: list[torch.Tensor] = []

    def gemm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, scales: None) -> torch.Tensor:
        seen.append(weight)
        return x.new_zeros(len(x), weight.shape[1])

    assert all(parameter.is_meta for layer in done.layers for parameter in layer.parameters())
    done.layers[0](torch.randn(2, 5), torch.tensor([[0, 1], [2, 3]]), gemm)
    assert [torch.equal(weight, weights[name]) for weight, name in zip(seen, ("w13", "w2"), strict=True)] == [True] * 2
