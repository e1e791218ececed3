"""Where a model is: its folder, the user's home, or huggingface_hub's cache, from which nothing is downloaded."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from vmm_dwdp import ConfigError
from vmm_dwdp.model_folder import find_folder, read_config

COMMITS = {"main": "a" * 40, "old": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As huggingface_hub lays a cache out: files by their digests, links to them by commit, commits by branch."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "hub"
    model = cache / "models--org--tiny-moe"
    (model / "refs").mkdir(parents=True)
    (model / "blobs").mkdir()
    for branch, commit in COMMITS.items():
        (model / "refs" / branch).write_text(commit)
        (model / "blobs" / commit).write_text(f'{{"model_type": "{branch}"}}')
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").symlink_to(model / "blobs" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny-moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("org/tiny-moe") == Path("org/tiny-moe")
    assert find_folder(tmp_path / "org") == tmp_path / "org"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~/models") == tmp_path / "models"
    with pytest.raises(ConfigError, match=f"there is no directory {tmp_path}/nothing"):
        find_folder("~/nothing")


@pytest.mark.parametrize(
    ("revision", "found"), [(None, "main"), ("main", "main"), ("old", "old"), (COMMITS["old"], "old")]
)
def test_a_model_that_was_downloaded(cache: Path, revision: str | None, found: str) -> None:
    folder = find_folder("org/tiny-moe", revision)
    assert folder.is_relative_to(cache)
    assert read_config(folder) == {"model_type": found}


@pytest.mark.parametrize(
    ("name", "revision", "command"),
    [
        ("org/other", None, "hf download org/other puts it there"),
        ("org/tiny-moe", "new", "hf download org/tiny-moe --revision new puts it there"),
    ],
)
def test_a_model_that_was_not(cache: Path, name: str, revision: str | None, command: str) -> None:
    with pytest.raises(ConfigError, match=f"no model of that name in {cache}: {command}"):
        find_folder(name, revision)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'vmm-dwdp\[hf\]' and then hf download org/tiny"):
        find_folder("org/tiny")


@pytest.mark.parametrize("name", ["one", "a/b/c", "/org/name", "../org", "org/", "./org/name"])
def test_what_is_no_name_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no directory") as refused:
        find_folder(name)
    assert "hf download" not in str(refused.value)


def test_a_model_out_of_the_cache_is_spread(cache: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from support.groups import PAGE
    from support.moe_models import logits, tiny_model

    from vmm_dwdp import DWDPConfig
    from vmm_dwdp.allocator.host_driver import HostDriver
    from vmm_dwdp.integrations.transformers import from_pretrained

    snapshot = find_folder("org/tiny-moe")
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "saved")
    (snapshot / "config.json").unlink()
    for file in (tmp_path / "saved").iterdir():
        shutil.copy(file, cache / file.name)
        (snapshot / file.name).symlink_to(cache / file.name)
    config = DWDPConfig(group_size=1, host_experts=3)
    place = {"rendezvous": tmp_path / "group", "device": "cpu", "driver": HostDriver(PAGE)}
    model = from_pretrained("org/tiny-moe", config, rank=0, **place)
    with model.dwdp:
        assert torch.equal(logits(model), logits(tiny_model("qwen3_moe")))
