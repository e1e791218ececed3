"""What is printed where no terminal listens."""

import sys
from pathlib import Path

import pytest

from vmm_dwdp.cli.console import group_progress, print_table, report_step, size


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (81 << 30, "81.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size(nbytes: int, expected: str) -> None:
    assert size(nbytes) == expected


def test_table_is_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Ranks", ("rank", "held"), [("0", "64 of 256"), ("10", "64")])

    assert capsys.readouterr().out == "Ranks\n  rank  held\n  0     64 of 256\n  10    64\n"


def test_progress_is_silent_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with group_progress(tmp_path, 2, ("starting", "done"), shown=True):
        report_step(tmp_path, 1, "done")
        report_step(tmp_path, 0, "done")

    assert capfd.readouterr() == ("", "")


def test_progress_is_drawn_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with group_progress(tmp_path, 2, ("starting", "loading", "done"), shown=True):
        report_step(tmp_path, 1, "loading")
        report_step(tmp_path, 0, "done")

    drawn = capfd.readouterr().err
    assert "rank 1: loading" in drawn
    assert "rank 0: done" in drawn
