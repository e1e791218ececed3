"""The command line apart from what its commands do."""

import os
import signal
import subprocess
import sys

import pytest

from vmm_dwdp import cli
from vmm_dwdp.errors import DWDPError

PLAN = ["plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "4", "--tokens", "8192"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])

    assert end.value.code == 0
    assert f"vmm-dwdp {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])

    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["dance"])

    assert end.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_error_becomes_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise DWDPError("nothing works today")

    monkeypatch.setattr("vmm_dwdp.cli.doctor.run", fail)

    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "vmm-dwdp doctor: nothing works today\n"


def test_nobody_reads_the_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        command = [sys.executable, "-m", "vmm_dwdp", *PLAN]
        ended = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, check=False)

    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr == b""
