"""``vmm-dwdp demo`` from its options to its exit status, on the model in the package."""

import json
from pathlib import Path

import pytest

from vmm_dwdp import cli
from vmm_dwdp.allocator.handles import KINDS
from vmm_dwdp.cli.demo import MODEL

pytest.importorskip("transformers")


def run_demo(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict]:
    status = cli.main(["demo", "--device", "cpu", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--group-size", "3"), id="does not divide"),
        pytest.param(("--group-size", "2", "--num-local-experts", "10", "--prefetch-depth", "1"), id="overlap"),
        pytest.param(("--group-size", "1", "--host-experts", "13"), id="one rank and host memory"),
    ],
)
def test_group_computes_what_the_whole_model_computes(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_demo(capsys, *options)

    assert status == 0
    assert report["identical"] is True
    assert report["driver"] == "host"
    assert [rank["rank"] for rank in report["ranks"]] == list(range(report["group_size"]))
    assert all(rank["fetched_bytes"] > 0 and rank["hits"] > 0 and rank["misses"] == 0 for rank in report["ranks"])
    assert report["leaked"] == dict.fromkeys(KINDS, 0)


def test_prefill_is_staged_and_decode_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "She had been walking for some time when"  # more tokens than any that mode auto tries in place at first
    options = ("--group-size", "2", "--mode", "auto", "--generate", "5", "--prompt", prompt)
    status, report = run_demo(capsys, *options)

    assert status == 0
    layers = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    for rank in report["ranks"]:
        assert rank["identical"]
        assert (rank["replays"], rank["not_captured"]) == (None, "")
        # two tokens that are not timed, and five
        assert (rank["hits"], rank["misses"], rank["in_place"]) == (2 * layers, 0, (1 + 4) * layers)


def test_group_of_one_fetches_nothing_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_demo(capsys, "--group-size", "1")

    assert report["identical"] is True
    assert report["ranks"][0]["fetched_bytes"] == 0
    assert status == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--group-size", "0"), "group_size must be at least 1"),
        (("--num-local-experts", "2"), "num_local_experts must be at least 4"),
        (("--model", "nowhere"), "there is no directory nowhere"),
        (("--prompt", ""), "the prompt is empty"),
        (("--generate", "0"), "--generate must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--device", "cpu", *options]) == 2

    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "stated",
    [
        pytest.param("mode: in_place\nprefetch_depth: 0\n", id="in place"),
        pytest.param("assembly: tensor_list\n", id="tensor list"),
        pytest.param("host_experts: 5\nprefetch_depth: 4\n", id="host memory"),
    ],
)
def test_every_kind_of_config_is_identical(stated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dwdp.yaml"
    file.write_text("group_size: 2\n" + stated)

    status, report = run_demo(capsys, "--config", str(file), "--prompt", "My dear")

    assert status == 0
    assert report["identical"] is True
    assert [rank["experts_held"] for rank in report["ranks"]] == ([6, 6] if "host" in stated else [8, 8])
    assert [rank["prompt"] for rank in report["ranks"]] == ["My dear", "My dear"]
