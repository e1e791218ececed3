"""``vmm-dwdp plan`` and ``simulate`` as a user meets them."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from support.room import Counted

from vmm_dwdp import cli

GROUP = ["qwen3-30b-a3b", "--gpu", "h100", "--group-size", "4", "--tokens", "8192"]


def test_plan_prints_where_memory_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *GROUP, "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    memory = report["memory_bytes"]
    parts = ("replicated", "resident_experts", "slots", "activations", "context", "left_for_kv_cache")
    assert sum(memory[part] for part in parts) == 80_000_000_000
    assert report["pass"]["speedup"] == pytest.approx(report["pass"]["expert_parallel_s"] / report["pass"]["dwdp_s"])


@pytest.mark.parametrize("file", ["config.json", "."])
def test_plan_for_a_model_of_ones_own(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = files("vmm_dwdp") / "models" / "bytes-moe" / file

    assert cli.main(["plan", str(path), *GROUP[1:], "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["model"] == str(path)


def test_plan_prints_tables_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"

    assert cli.main(["plan", *GROUP, "--plot", str(picture)]) == 0

    assert "It pays from" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_over_nodes_by_network_and_by_nvlink(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "2", "--tokens", "4096", "--json"]
    reports = []
    for options in ([], ["--nodes", "4", "--network", "100"]):
        assert cli.main([*command, *options]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    one, four = reports
    assert one["nodes"] is None
    about = four["nodes"]
    assert (about["ranks"], about["network_bytes_per_s"]) == (8, 100e9)
    rows = about["by_number_of_nodes"]
    assert [row["nodes"] for row in rows] == [1, 2, 4]
    assert rows[0]["dwdp_s"] == one["pass"]["dwdp_s"]
    assert rows[0]["pays_from_tokens"] == one["pays_from_tokens"]
    assert rows[-1]["dwdp_s"] == four["pass"]["dwdp_s"]
    fetched = [row["fetched_bytes"] for row in rows]
    assert [fetched[0] / each for each in fetched] == pytest.approx([1, 2, 4], rel=0.03), "but for shared pages"
    assert [row["network_s"] for row in rows] == [row["network_bytes_sent"] / 100e9 for row in rows]
    assert rows[0]["network_bytes_sent"] == 0 < rows[1]["network_bytes_sent"] < rows[2]["network_bytes_sent"]
    assert rows[1]["network_bytes_sent"] * 2.02 > 4096 * 2 * 2048 * 2, "nearly every token, there and back, to one node"
    assert cli.main([*command[:-1], "--nodes", "4", "--network", "100"]) == 0
    assert "By number of nodes of 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("local", ["auto", "20"])
def test_experts_of_a_rank_are_of_its_node(local: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "2", "--tokens", "4096", "--nodes", "4"]
    assert cli.main([*command, "--local-experts", local, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_local_experts"] == (32 if local == "auto" else 20), "a node has 32, which all fit"
    assert report["local_experts"][0]["number"] == 16
    assert report["local_experts"][-1]["number"] == 32
    assert report["local_experts"][-1]["fetched_bytes"] == 0


def test_simulated_rails_wait_for_the_slowest(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "2", "--tokens", "16384", "--nodes", "2"]
    waited = []
    for spread in ("0", "0.5"):
        assert cli.main([*command, "--passes", "2", "--spread", spread, "--json"]) == 0
        waited.append(json.loads(capsys.readouterr().out)["waited_for_nodes_share"])
    assert waited[0] < 0.01 < waited[1]


# Qwen3-30B-A3B: 48 layers of 128 experts, 2048 wide, 768 inside, in bf16: gate and up are one weight, down the other.
EXPERTS, WEIGHTS, PAGE = 128, (2 * 768 * 2048 * 2, 768 * 2048 * 2), 2 << 20
COUNTED = Counted([(EXPERTS, WEIGHTS)] * 48, group_size=4, depth=2, page=PAGE)


def most_taken(number: int) -> int:
    """By the rank that takes most."""
    return max(COUNTED.takes(rank, number) for rank in range(4))


def test_plan_says_what_each_more_expert_takes_and_saves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *GROUP, "--local-experts", "40", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    rows = report["local_experts"]
    memory = report["memory_bytes"]
    for_experts_and_cache = memory["resident_experts"] + memory["slots"] + memory["left_for_kv_cache"]
    numbers = [row["number"] for row in rows]
    assert numbers[0] == EXPERTS // 4
    assert report["num_local_experts"] == 40
    assert 40 in numbers
    assert numbers == sorted(set(numbers))
    for row in rows:
        assert row["experts_bytes"] == most_taken(row["number"])
        assert row["left_bytes"] == for_experts_and_cache - row["experts_bytes"] >= 0
        remote = (EXPERTS - row["number"]) * sum(WEIGHTS)
        assert remote - 2 * PAGE < row["fetched_bytes"] <= remote, "what shares a page with own experts stays"
    assert numbers[-1] == EXPERTS or most_taken(numbers[-1] + 1) > for_experts_and_cache
    (own,) = (row for row in rows if row["number"] == 40)
    assert own["pass_s"] == report["pass"]["dwdp_s"]
    assert own["copying_s"] == report["layer"]["prefetch_beside_others_s"]
    assert own["fetched_bytes"] == report["layer"]["fetched_bytes"]

    cli.main(["plan", *GROUP])
    printed = capsys.readouterr().out
    title = "Experts a rank holds of each layer, from an equal share to as many as fit"
    lines = printed[printed.index(title) :].splitlines()
    assert lines[1].split()[0] == "experts"
    assert [int(line.split()[0]) for line in lines[2 : 2 + len(rows) - 1]] == [n for n in numbers if n != 40]
    assert "One more expert takes 414.0 MiB, and saves 9.0 MiB of a layer's copies." in lines  # 46 and 1 times 9 MiB


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize(("spare", "number"), [(0, 50), (-1, 49)])
def test_as_many_as_fit(command: str, spare: int, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*GROUP[:-1], "512", "--json"] + ["--passes", "1"] * (command == "simulate")
    found = []
    for options in (["auto", "--memory-bytes", str(most_taken(50) + spare)], [str(number)]):
        assert cli.main([command, *few, "--local-experts", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
        found[-1].pop("simulated_in_s", None)
    assert found[0] == found[1]


def test_as_many_as_fit_into_half_of_what_the_rest_of_the_model_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *GROUP, "--local-experts", "auto", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    free = 80_000_000_000 - report["memory_bytes"]["replicated"] - report["memory_bytes"]["context"]
    number = report["num_local_experts"]
    assert most_taken(number) <= free // 2 < most_taken(number + 1)


def test_plan_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "kimi-k2", "--gpu", "h100", "--group-size", "8", "--tokens", "1000"]) == 2

    assert "kimi-k2 does not fit on H100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["plan", *GROUP[:-1], "0"], "a forward pass needs at least one token"),
        (["plan", *GROUP, "--memory-bytes", "1"], "memory_bytes needs num_local_experts: auto"),
        (
            ["plan", *GROUP, "--local-experts", "auto", "--memory-bytes", "1073741824"],
            "an equal share of the experts of qwen3-30b-a3b takes 15.2 GiB of each H100 in a group of 4, and experts",
        ),
        (["plan", *GROUP, "--request-tokens", "0"], "needs at least one token, and so does a request"),
        (["simulate", *GROUP, "--passes", "0"], "--passes and --in-flight must be at least 1"),
        (["plan", *GROUP, "--slice-bytes", "0"], "slice_bytes must be at least 16, not 0"),
        (["plan", *GROUP, "--nodes", "0"], "--nodes must be at least 1, not 0"),
        (["plan", *GROUP, "--nodes", "200"], "qwen3-30b-a3b has 128 experts, fewer than 200 nodes"),
        (["plan", *GROUP, "--network", "43"], "--network needs --nodes"),
        (["plan", *GROUP, "--nodes", "2", "--network", "0"], "more than 0 bytes a second, not 0"),
        (["plan", *GROUP, "--imbalance", "-1"], "--imbalance must be at least 0, not -1.0"),
        (["simulate", *GROUP, "--slow-rank", "0"], "--slow-rank must be more than 0, not 0.0"),
        (["simulate", *GROUP, "--sees", "4"], "--sees needs --slice-bytes auto and --resolution copies"),
        (
            ["simulate", *GROUP, "--sees", "4", "--slice-bytes", "auto"],
            "--sees needs --slice-bytes auto and --resolution",
        ),
        (
            ["plan", *GROUP, "--slice-bytes", "streams", "--run-bytes", "4096"],
            "--run-bytes and --run-gap need --slice-bytes auto",
        ),
        (
            ["plan", *GROUP, "--slice-bytes", "4096", "--run-gap", "4"],
            "--run-bytes and --run-gap need --slice-bytes auto",
        ),
        (["plan", *GROUP, "--slice-bytes", "auto", "--run-bytes", "0"], "a run has at least 4096 bytes, not 0"),
        (["plan", *GROUP, "--slice-bytes", "auto", "--run-gap", "-1"], "at least 0, not -1e-06 s"),
        (["trace", "--tokens", "0"], "a forward pass needs at least one token"),
        (["simulate", *GROUP, "--spread", "1"], "--spread at least 0 and less than 1"),
        (["trace", "--layers", "0"], "--layers and --passes must be at least 1"),
    ],
)
def test_options_that_cannot_be(command: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 2

    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"), [("matplotlib.figure", ["plan", *GROUP, "--plot", "x.png"]), ("transformers", ["demo"])]
)
def test_a_package_that_is_not_there_is_named(
    package: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    assert cli.main(command) == 2

    assert f"needs {package.partition('.')[0]}: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--resolution", "copies", "--in-flight", "2", "--slice-bytes", "4194304"]])
def test_simulate_agrees_with_plan_where_ranks_are_alike(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    slices = more[-2:] if more else []
    cli.main(["plan", *GROUP, *slices, "--json"])
    planned = json.loads(capsys.readouterr().out)

    assert cli.main(["simulate", *GROUP, *more, "--spread", "0", "--passes", "3", "--json"]) == 0

    simulated = json.loads(capsys.readouterr().out)
    assert simulated["pass_ms"] == pytest.approx(planned["pass"]["dwdp_s"] * 1e3, rel=0.02)
    assert simulated["throughput_over_expert_parallel"] == pytest.approx(planned["pass"]["speedup"], rel=0.03)


def test_owners_that_are_chosen_make_copies_faster_by_plan_and_by_simulation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Few tokens: the copies decide. As fetches, since ranks that begin in step and take turns do not meet at all."""
    few = [*GROUP[:-1], "512", "--json"]
    found = {}
    for name, options in {"fixed": ["--slice-bytes", "streams"], "chosen": ["--slice-bytes", "auto"]}.items():
        cli.main(["plan", *few, *options])
        planned = json.loads(capsys.readouterr().out)
        cli.main(["simulate", *few, *options, "--passes", "3"])
        found[name] = planned, json.loads(capsys.readouterr().out)

    (fixed, in_fixed_order), (by_choice, in_chosen_order) = found["fixed"], found["chosen"]
    assert fixed["layer"]["prefetch_s"] == by_choice["layer"]["prefetch_s"]
    assert fixed["layer"]["prefetch_beside_others_s"] > 1.2 * by_choice["layer"]["prefetch_beside_others_s"]
    assert by_choice["pays_from_tokens"] < fixed["pays_from_tokens"]
    assert in_fixed_order["pass_ms"] > 1.2 * in_chosen_order["pass_ms"]


def test_runs_copy_by_copy_take_as_long_as_planned_and_it_counts_whom_a_rank_sees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [*GROUP[:-1], "512", "--json", "--slice-bytes", "auto"]
    cli.main(["plan", *few])
    planned = json.loads(capsys.readouterr().out)["pass"]["dwdp_s"] * 1e3
    simulated = {}
    for sees in ("4", "1"):
        cli.main(["simulate", *few, "--passes", "3", "--resolution", "copies", "--sees", sees])
        simulated[sees] = json.loads(capsys.readouterr().out)["pass_ms"]

    assert simulated["4"] == pytest.approx(planned, rel=0.03)
    assert simulated["1"] != simulated["4"]


def test_slice_bytes_are_a_number_or_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", *GROUP, "--slice-bytes", "some"])

    assert "a whole number, auto or streams, not 'some'" in capsys.readouterr().err


def test_a_slow_rank_slows_only_itself(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", *GROUP, "--spread", "0", "--json"]
    cli.main(command)
    even = json.loads(capsys.readouterr().out)

    cli.main([*command, "--slow-rank", "1.5"])

    slow = json.loads(capsys.readouterr().out)
    assert slow["slowest_rank_ms"] == pytest.approx(1.5 * even["slowest_rank_ms"], rel=0.1)
    assert slow["fastest_rank_ms"] == pytest.approx(even["fastest_rank_ms"], rel=0.02)
    assert slow["throughput_over_expert_parallel"] > even["throughput_over_expert_parallel"]


DECODE = ["plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "1", "--host-experts", "128", "--tokens", "1"]
TRACE = str(Path(__file__).parents[3] / "benchmarks" / "traces" / "mixed-0.01.npz")


def test_plan_of_decoding_says_tokens_a_second_by_the_size_of_a_bank(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--decode", "--format", "fp8", "--trace", TRACE, "--bank", "25%"]
    assert cli.main([*DECODE, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    none, *banks = report["by_bank"]
    token = 48 * 8 * report["expert_bytes"]
    rows = [bank["bank_rows"] for bank in banks]

    assert rows == [8, 16, 32, 48, 64, 96]
    assert none["missed_bytes"] == token == pytest.approx(1.81e9, rel=0.005)
    assert none["link_s"] == pytest.approx(token / (0.84 * 64e9))
    assert {name: report[name] for name in none} == banks[rows.index(32)]
    assert report["missed_bytes"] == pytest.approx((1 - report["hits"]) * token)
    assert report["hits"] == pytest.approx(0.615, abs=0.0005), "docs/routing.md"
    assert report["bound_tokens_per_s"] == pytest.approx(1 / (report["link_s"] + report["gpu_s"]))
    assert report["kernels_s"] == pytest.approx(48 * 98e-6)
    step = (report["link_s"] + report["gpu_s"] + report["kernels_s"]) / report["of_bound"]
    assert report["expected_tokens_per_s"] == pytest.approx(1 / step)
    assert [bank["hits"] for bank in banks] == sorted(bank["hits"] for bank in banks)
    for bank in banks:
        assert bank["left_for_kv_cache"] == none["left_for_kv_cache"] - bank["bank_bytes"]

    assert cli.main([*DECODE, *options]) == 0
    said = capsys.readouterr().out
    assert "32 experts *" in said
    assert f"{report['expected_tokens_per_s']:.1f}" in said
    assert "limited by the link to host memory" in said


def test_plan_of_decoding_takes_a_link_and_a_bank_in_gigabytes(capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for link in ("25", "50"):
        assert cli.main([*DECODE, "--decode", "--link", link, "--bank", "8", "--depth", "0", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    slow, fast = reports

    assert slow["link_s"] == pytest.approx(2 * fast["link_s"])
    assert 0 < fast["bank_bytes"] <= 8e9 < fast["bank_bytes"] * (fast["bank_rows"] + 1) / fast["bank_rows"]
    assert fast["hits"] == fast["bank_rows"] / 128, "tokens choose evenly"
    assert fast["bank_rows"] in [bank["bank_rows"] for bank in fast["by_bank"]]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--bank", "25%"], "--bank needs --decode"),
        (["--trace", TRACE], "--trace needs --decode"),
        (["--decode", "--nodes", "2"], "--nodes is not for --decode"),
        (["--decode", "--run-bytes", "5"], "--run-bytes is not for --decode"),
        (["--decode", "--plot", "a.png"], "--plot is not for --decode"),
        (["--decode", "--link", "0"], "--link must be more than 0, not 0"),
        (["--decode", "--bank", "101%"], "--bank is a share as 25%, or a number of GB, not '101%'"),
        (["--decode", "--bank", "much"], "--bank is a share as 25%, or a number of GB, not 'much'"),
        (["--decode", "--bank", "nan"], "--bank is a share as 25%, or a number of GB, not 'nan'"),
        (["--decode", "--bank", "inf"], "--bank is a share as 25%, or a number of GB, not 'inf'"),
        (["--decode", "--bank", "1"], "room for 2 experts of each layer, and a token uses 8"),
        (["--decode", "--bank", "100%", "--request-tokens", "400000"], "does not fit on H100"),
        (["--decode", "--trace", "missing.npz"], "missing.npz cannot be read as a routing trace"),
    ],
)
def test_plan_of_decoding_refuses_in_a_sentence(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*DECODE, *options]) == 2
    assert why in capsys.readouterr().err


def test_the_page_has_what_plan_prints_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "planning.md").read_text()
    (command,) = [
        line.split()[1:] for line in page.splitlines() if line.startswith("vmm-dwdp plan") and "--bank" in line
    ]
    assert cli.main([str(root / word) if word.endswith(".npz") else word for word in command]) == 0
    table = capsys.readouterr().out.splitlines()[:-2]

    assert "\n".join(table) in page
