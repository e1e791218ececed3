"""What `benchmarks/sglang_multi_gpu.py` asks for, what it makes of answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import sglang_mixes
import sglang_multi_gpu
import sglang_quantised
import sglang_variants
from engine_processes import Failed
from sglang_checkpoint import Shape
from sglang_variants import Task, Variant

from vmm_dwdp.planning.gpus import load_gpu

H100 = load_gpu("h100")
SMALL = Shape(2, 256, 4, 128, heads=2, kv_heads=1, experts_per_token=2, vocabulary=512)


def task(ranks: int = 2) -> Task:
    return Task(Path("model"), SMALL, ranks, "cuda", (8192, 32768))


def test_prompts_of_a_mix() -> None:
    assert sglang_mixes.lengths("8 of 4K", 3, 8192) == [[4096] * 8] * 3
    assert sglang_mixes.lengths("2 of 32K", 1, 8192, unit=8) == [[256] * 2]
    unequal = sglang_mixes.lengths("4 of 4K to 28K", 4, 8192)
    assert len({count for of_rank in unequal for count in of_rank}) == 16
    assert all(4096 <= count < 28 * 1024 for of_rank in unequal for count in of_rank)


@pytest.mark.parametrize("chunk", [8192, 32768])
def test_ranks_that_drift_have_the_same_prompts_a_chunk_apart(chunk: int) -> None:
    in_step, drifting = (sglang_mixes.lengths(mix, 4, chunk) for mix in ("in step", "drifting"))
    assert in_step == [in_step[0]] * 4
    assert in_step[0][0] == chunk
    assert in_step[0][1] >= 2 * chunk
    assert drifting == [in_step[0], in_step[0][::-1]] * 2

    given = [sglang_mixes.prompts(*each, 100) for each in (("in step", in_step), ("drifting", drifting))]
    assert given[0][0] == given[1][0]
    assert given[0][1] == given[1][1][::-1]
    assert given[0][0][0] != given[0][1][0]
    assert [[len(prompt) for prompt in of_rank] for of_rank in given[1]] == drifting


def test_prompts_of_a_rank_differ_and_are_the_same_again() -> None:
    wanted = sglang_mixes.lengths("8 of 4K", 2, 64, unit=8)
    given = sglang_mixes.prompts("8 of 4K", wanted, 512)
    assert len({str(prompt) for of_rank in given for prompt in of_rank}) == 16
    assert given == sglang_mixes.prompts("8 of 4K", wanted, 512)
    assert given != sglang_mixes.prompts("another", wanted, 512)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_least_time_counts_every_product(fp8: bool) -> None:
    products = other = 0
    for count in (3, 5, 7):
        for token in range(count):
            for _ in range(SMALL.layers):
                projections = 256 * 256 + 2 * 128 * 256 + 256 * 256
                products += 2 * (projections + SMALL.experts_per_token * 3 * 256 * 128)
                other += 2 * 256 * SMALL.experts + 4 * 256 * (token + 1)
        other += 2 * 256 * 512
    peak = H100.peak_flops["fp8" if fp8 else "bf16"]
    expected = (products / peak + other / H100.peak_flops["bf16"]) / 2

    found = sglang_mixes.least_prefill_seconds(SMALL, [[3, 5], [7]], H100, fp8=fp8)

    assert found == pytest.approx(expected)


def row(**figures: Any) -> dict[str, Any]:
    return {"digest": "d", "tokens": [[1, 2], [3, 4]], **figures}


def test_figures_that_the_gpus_cannot_have_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tables = sglang_multi_gpu.Tables(task(), H100, fp8=True)
    wanted = sglang_mixes.lengths("4 of 8K", 2, 8192)
    least = sglang_mixes.least_prefill_seconds(SMALL, wanted, H100, fp8=True)
    step = sglang_mixes.least_decode_seconds(SMALL, 2, H100, bits=8) * 1e3
    prefill = {"chunk": 8192, "mix": "4 of 8K"}
    tables.add("dwdp", row(**prefill, seconds=1.01 * least))
    tables.add("dwdp", row(**{"sequences a rank": 1, "ms a step": 1.01 * step}))
    assert [json.loads(line)["variant"] for line in capsys.readouterr().err.splitlines()] == ["dwdp", "dwdp"]

    with pytest.raises(Failed, match="cannot be: at the peaks of 2 H100 it takes"):
        tables.add("dwdp", row(**prefill, seconds=0.99 * least))
    with pytest.raises(Failed, match="cannot be: at the peaks of 2 H100 it takes"):
        tables.add("dwdp", row(**{"sequences a rank": 1, "ms a step": 0.99 * step}))
    assert capsys.readouterr().err == ""
    assert (len(tables.prefill), len(tables.decode)) == (1, 1)


def test_tokens_are_compared_with_the_first_variants() -> None:
    tables = sglang_multi_gpu.Tables(task(), None, fp8=False)
    for variant, tokens in (("a", [[1, 2], [3, 4]]), ("b", [[1, 2], [9, 4]])):
        tables.add(variant, row(chunk=1, mix="4 of 8K", tokens=tokens))
    tables.add("b", row(chunk=2, mix="4 of 8K", tokens=[[9, 9]]))

    found = [(each["same tokens"], each["same first tokens"]) for each in tables.prefill]
    assert found == [(1, 1), (0.75, 0.5), (1, 1)]
    assert not any("tokens" in each for each in tables.prefill)


def test_this_library_is_compared_with_each_of_the_others() -> None:
    def of(variant: str, mix: str, rate: float, ranks: list[float], digest: str = "d") -> dict[str, Any]:
        figures = {"tokens/s a GPU": rate, "tokens/s of each rank": ranks, "digest": digest}
        return {"variant": variant, "chunk": 8192, "mix": mix, **figures}

    rows = [
        of("dwdp auto staged", "in step", 120.0, [90.0, 60.0]),
        of("ep", "in step", 100.0, [50.0, 50.0], "other"),
        of("one", "in step", 150.0, [100.0, 50.0]),
        of("dwdp auto staged", "drifting", 90.0, [90.0, 90.0]),
    ]
    about = {"variant": "dwdp auto staged", "chunk": 8192}
    none = {"over tp": None, "over own": None}
    assert sglang_multi_gpu.compared(rows) == [
        about
        | {"mix": "in step", "over ep": 1.2, **none}
        | {"each rank over one GPU, least": 0.9, "tokens of one GPU": True},
        about
        | {"mix": "drifting", "over ep": None, **none}
        | {"each rank over one GPU, least": None, "tokens of one GPU": None},
    ]
    assert sglang_multi_gpu.drift(rows) == [about | {"drifting / in step": 0.75}]


def test_decode_beside_the_others_and_what_comes_over_the_link() -> None:
    rows = [
        {"variant": variant, "sequences a rank": sequences, "ms a step": ms}
        for variant, sequences, ms in (("one", 1, 2.0), ("dwdp auto auto", 1, 5.0), ("dwdp auto auto", 4, 6.0))
    ]
    found = sglang_multi_gpu.decode_compared(rows, lambda sequences: 10.0 * sequences)
    assert [[*row.values()] for row in found] == [
        ["dwdp auto auto", 1, 5.0, 2.0, None, None, 10.0],
        ["dwdp auto auto", 4, 6.0, None, None, None, 40.0],
    ]
    one_token = sglang_mixes.chosen_remote_seconds(SMALL, 4, 1, H100, fp8=True)
    assert one_token == pytest.approx(2 * 2 * 3 * 256 * 128 * 0.75 / H100.pull_rate), "two experts in each layer"
    every = sglang_mixes.chosen_remote_seconds(SMALL, 4, 1000, H100, fp8=False)
    assert every == pytest.approx(2 * 4 * 2 * 3 * 256 * 128 * 0.75 / H100.pull_rate), "all four"


def test_figures_of_answers() -> None:
    runs = [[[(1.0, [5]), (2.0, [6])], [(4.0, [7])]], [[(2.0, [5]), (3.0, [6])], [(8.0, [7])]]]
    found = sglang_variants.prefill_figures([[10, 20], [60]], runs, Variant("ep"))
    assert found == {
        "tokens/s a GPU": 90 / 6 / 2,
        "seconds": 6.0,
        "slowest / fastest run": 2.0,
        "first token s, median": 2.5,
        "first token s, last": 8.0,
        "tokens/s of each rank": [12, 10],
    }
    assert sglang_variants.prefill_figures([[10, 20], [60]], runs, Variant("tp"))["tokens/s of each rank"] is None


@pytest.mark.parametrize(("kind", "without"), [("dwdp", None), ("own", "1"), ("ep", "1"), ("tp", "1"), ("one", "1")])
def test_each_variant_says_whether_this_library_takes_part(
    kind: str, without: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = {"VMM_DWDP_CONFIG": "another", "VMM_DWDP_DISABLE": "another"}
    monkeypatch.setattr(sglang_variants.os, "environ", environment)
    variant = Variant(kind, *(("streams", "auto") if kind == "dwdp" else ()))
    sglang_variants.set_environment(variant, task(4), tmp_path)
    assert environment.get("VMM_DWDP_DISABLE") == without
    stated = environment.get("VMM_DWDP_CONFIG")
    if kind == "dwdp":
        assert stated is not None
        assert Path(stated).read_text() == "group_size: 4\nslice_bytes: streams\nmode: auto\n"
    else:
        assert stated is None


def test_blocks_of_fp8_have_a_scale_each() -> None:
    weights = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(0))
    found = sglang_quantised.in_blocks(weights)
    quantised, scales = found["weight"], found["weight_scale_inv"]
    assert (quantised.dtype, quantised.shape, scales.shape) == (torch.float8_e4m3fn, weights.shape, (2, 2, 3))
    again = quantised.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert ((again - weights).abs() <= weights.abs() / 16 + 1e-3).all(), "three bits of mantissa"
    assert quantised[1, 128:, :128].float().abs().max() == 448


class Engine:
    """Answers each prompt with its sum, after all were given."""

    def __init__(self, **about: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.given: list[tuple[int | None, list[int]]] = []
        self._about = about

    async def async_generate(
        self, *, input_ids: list[int], sampling_params: dict[str, Any], routed_dp_rank: int | None = None
    ) -> dict[str, Any]:
        self.given.append((routed_dp_rank, input_ids))
        await asyncio.sleep(0)
        about = {"prompt_tokens": len(input_ids), "cached_tokens": 0} | self._about
        return {"output_ids": [sum(input_ids)] * sampling_params["max_new_tokens"], "meta_info": about}


@pytest.mark.parametrize("kind", ["ep", "tp"])
def test_every_prompt_goes_to_its_rank_and_its_answer_comes_back_to_its_place(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_variants, "IDLE_SECONDS", 0)
    engine = Engine()
    found = sglang_variants.answered(engine, [[[1], [2, 3]], [[4]]], 2, Variant(kind))
    assert [[tokens for _, tokens in of_rank] for of_rank in found] == [[[1, 1], [5, 5]], [[4, 4]]]
    ranks = [0, 1, 0] if kind == "ep" else [None] * 3
    assert engine.given == list(zip(ranks, [[1], [4], [2, 3]], strict=True)), "the first of each rank first"
    assert sglang_variants.last(found) == max(seconds for of_rank in found for seconds, _ in of_rank) > 0


def test_an_answer_of_other_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_variants, "IDLE_SECONDS", 0)
    with pytest.raises(RuntimeError, match=r"\(1, 1\) tokens were computed and answered, not \(2, 1\)"):
        sglang_variants.answered(Engine(cached_tokens=1), [[[1, 2]]], 1, Variant("ep"))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_checkpoint_is_written_once(fp8: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def checkpoint(shape: Shape) -> None:
        sglang_multi_gpu.checkpoint(tmp_path / "model", shape, torch.device("cpu"), weights="fp8" if fp8 else "bf16")

    checkpoint(SMALL)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    per_layer = 5 + (4 + 3 * SMALL.experts) * (2 if fp8 else 1)
    assert len(tensors) == 3 + SMALL.layers * per_layer
    down = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert (down.shape, down.dtype) == ((256, 128), torch.float8_e4m3fn if fp8 else torch.bfloat16)
    files[0].write_text("as it was")
    checkpoint(SMALL)
    assert files[0].read_text() == "as it was"
    with pytest.raises(SystemExit, match="has another checkpoint than the one asked for"):
        checkpoint(SMALL._replace(layers=1))


def test_a_mix_is_asked_again_while_its_times_differ_by_over_a_tenth() -> None:
    def asked(*seconds: float) -> tuple[list[float], int]:
        left = iter(seconds)
        found = sglang_variants.settled(lambda: [[(next(left), [0])]], 2)
        return [answers[0][0][0] for answers in found], len(list(left))

    assert asked(1.0, 1.05, 9.0) == ([1.0, 1.05], 1)
    assert asked(9.0, 1.0, 1.2, 1.15, 9.0) == ([1.2, 1.15], 1)
    assert asked(9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 1.0) == ([9.0, 1.0], 1), "six times at most, and the row says so"
