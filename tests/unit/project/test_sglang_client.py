"""A process for SGLang's client: its runs, and what is left of one that failed or hung. The client is a stub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from engine_processes import Failed
from sglang_client import Client

LONG = 60.0  # seconds that no test waits
STUB = """
import argparse, json, os, sys, threading

def cli_main():
    parser = argparse.ArgumentParser()
    for name in ("--do", "--output-file"):
        parser.add_argument(name)
    given = parser.parse_args()
    if given.do == "says":
        print("Server at http://x is not ready. Exiting.")
        sys.exit(1)
    if given.do == "raises":
        raise ValueError("Warmup failed")
    if given.do == "hangs":
        threading.Event().wait()
    if given.do != "forgets":
        with open(given.output_file, "a") as file:
            file.write(json.dumps({"do": given.do, "process": os.getpid()}) + "\\n")
"""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    package = tmp_path / "packages/sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bench_serving.py").write_text(STUB)
    monkeypatch.syspath_prepend(package.parent)  # which processes that are spawned have, too
    started = Client(tmp_path, tmp_path, LONG)
    yield started
    started.kill()
    started.kill()  # again


def test_runs_are_of_one_process_and_have_options_of_their_own(client: Client) -> None:
    runs = [client.figures(f"--do {word}", LONG) for word in ("first", "second")]
    assert [run["do"] for run in runs] == ["first", "second"]
    assert runs[0]["process"] == runs[1]["process"]


@pytest.mark.parametrize(
    ("does", "sentence"),
    [
        ("says", r"SGLang's client: Server at http://x is not ready\. Exiting\."),
        ("raises", "SGLang's client: ValueError: Warmup failed"),
        ("forgets", r"SGLang's client: FileNotFoundError: .*run-2\.jsonl"),
        ("asks --for more", "SGLang's client: .*unrecognized arguments: --for more"),
    ],
)
def test_a_run_that_fails_has_its_sentence_and_the_next_another_process(
    does: str, sentence: str, client: Client
) -> None:
    before = client.figures("--do this", LONG)["process"]
    with pytest.raises(Failed, match=sentence):
        client.figures(f"--do {does}", LONG)
    after = client.figures("--do that", LONG)
    assert after["do"] == "that"
    assert after["process"] != before


def test_a_run_that_hangs_is_given_up_and_its_process_ends(client: Client) -> None:
    hung = client.figures("--do this", LONG)["process"]
    with pytest.raises(Failed, match="SGLang's client: not done after 0 s"):
        client.figures("--do hangs", 0)
    assert not Path(f"/proc/{hung}").exists()
    assert client.figures("--do that", LONG)["do"] == "that"


def test_one_that_does_not_start_is_given_up(tmp_path: Path) -> None:
    started = Client(tmp_path, tmp_path, 0.0)
    try:
        with pytest.raises(Failed, match="SGLang's client: not ready after 0 s"):
            started.figures("", LONG)
    finally:
        started.kill()
