"""The commands and the config of docs/sglang.md, as SGLang and the plugin read them."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vmm_dwdp.integrations.sglang import settings

PAGE = (Path(__file__).parents[2] / "docs/sglang.md").read_text()
COMMANDS = re.findall(r"^.*python -m sglang\.launch_server (.*)$", PAGE, re.MULTILINE)
CONFIGS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("options", COMMANDS)
def test_sglang_takes_the_options(options: str) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)

    parser.parse_args(shlex.split(options))


@pytest.mark.parametrize("text", CONFIGS)
def test_the_plugin_takes_the_config(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dwdp.yaml").write_text(text)
    monkeypatch.setenv(settings.CONFIG, str(tmp_path / "dwdp.yaml"))

    size = settings.read(str(tmp_path / "dwdp.yaml")).config.group_size
    assert settings.wanted(dwdp_size=size)
    assert settings.stated(dwdp_size=size).is_open
