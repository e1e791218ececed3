"""The command line as a user starts it: real processes, and one line for whatever a user can get wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vmm_dwdp
from vmm_dwdp import cli
from vmm_dwdp.cli.demo import MODEL

ROOT = Path(vmm_dwdp.__file__).parents[1]
PLAN = ("plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "4", "--tokens", "8192")


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which torch cannot be imported: what works nevertheless works at once."""
    folder = tmp_path / "instead"
    folder.mkdir()
    (folder / "torch.py").write_text('raise RuntimeError("torch was imported")')
    return folder


def start(*words: str, at: Path | None = None, first: Path | None = None) -> subprocess.Popen[str]:
    paths = [str(path) for path in (first, ROOT) if path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_CACHE": "/nowhere/hub",
        "TMPDIR": str(at or ROOT),
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "vmm_dwdp", *words],
        cwd=at,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may have it ignored
    )


def ran(*words: str, at: Path | None = None, first: Path | None = None) -> tuple[int, str, str]:
    """The exit status, and what it printed on standard output and standard error."""
    with start(*words, at=at, first=first) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_there_is_one_version(no_torch: Path) -> None:
    assert ran("--version", first=no_torch) == (0, f"vmm-dwdp {vmm_dwdp.__version__}\n", "")


def test_the_installed_package_has_the_same_version() -> None:
    try:
        installed = importlib.metadata.version("vmm-dwdp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    assert installed == vmm_dwdp.__version__


def empty(folder: Path) -> None:
    folder.mkdir()


def without_json(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("[1")


def without_type(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def without_weights(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)


MODELS = {
    empty: "model is not the folder of a Hugging Face model: it has no config.json",
    without_json: "cannot read model/config.json: Expecting ',' delimiter",
    without_type: "model is not the folder of a Hugging Face model: its config.json names no model_type",
    without_weights: "model has no safetensors files",
    lambda folder: None: "there is no directory model",
}


@pytest.mark.parametrize(("make", "sentence"), MODELS.items())
def test_a_model_that_is_none_is_refused_at_once(make: object, sentence: str, tmp_path: Path, no_torch: Path) -> None:
    assert callable(make)
    make(tmp_path / "model")
    status, out, err = ran("demo", "--model", "model", at=tmp_path, first=no_torch)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"vmm-dwdp demo: {sentence}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("demo", "--group-size", "1", "--prompt", "a", "--prompt", "b"), "2 prompts were given to a group of 1"),
        (("demo", "--config", "nowhere.yaml"), "cannot read the config nowhere.yaml"),
        (("demo", "--model", "org/name"), "hf download org/name puts it there"),
        (("demo", "--model", "~/no model"), f"there is no directory {Path.home()}/no model"),
    ],
)
def test_what_is_seen_at_once(words: tuple[str, ...], sentence: str, tmp_path: Path, no_torch: Path) -> None:
    status, out, err = ran(*words, at=tmp_path, first=no_torch)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert sentence in err


OUTPUTS = [
    ((*PLAN, "--plot", "nowhere/x.png"), "plan: --plot nowhere/x.png cannot be written: there is no folder nowhere"),
    (("trace", "--output", "nowhere/x.json"), "trace: --output nowhere/x.json cannot be written"),
    (("trace", "--plot", "."), "trace: --plot . cannot be written: it is a folder"),
    (("bench", "--calibrate", "--output", "nowhere/x.yaml"), "bench: --output nowhere/x.yaml cannot be written"),
]


def test_an_output_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    words, sentence = OUTPUTS[0]
    assert ran(*words, at=tmp_path) == (2, "", f"vmm-dwdp {sentence}\n")


@pytest.mark.parametrize(("words", "sentence"), OUTPUTS)
def test_an_output_that_cannot_be_is_seen_before_the_work(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object) -> None:
        pytest.fail("it has begun to work")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmm_dwdp.cli.plan.estimate_from", work)
    monkeypatch.setattr("vmm_dwdp.cli.trace.run_group", work)
    monkeypatch.setattr("vmm_dwdp.cli.bench._calibrate", work)
    assert cli.main(words) == 2
    assert f"vmm-dwdp {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "trace"])
def test_a_gpu_that_is_not_there(command: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, out, err = ran(command, "--device", "cuda", at=tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"vmm-dwdp {command}: --device cuda needs a GPU: " in err


def test_a_type_of_model_that_nobody_knows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "nonsense"}')
    status, out, err = ran("demo", "--device", "cpu", "--model", "model", at=tmp_path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "transformers cannot load model: " in err
    assert "nonsense" in err


INTERRUPTED = (128 + signal.SIGINT, "", "vmm-dwdp: interrupted\n")


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert ran(*PLAN, first=tmp_path) == INTERRUPTED


@pytest.mark.parametrize("running", [0, 3], ids=["ranks start", "ranks run"])
def test_ctrl_c_reaches_all_processes_of_a_group_and_leaves_nothing(
    running: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As a terminal sends it: to the command and to its ranks, which are importing, or have come to their group."""
    tmp_path = tmp_path_factory.mktemp("at")  # short, as ranks listen at sockets below it
    with start("trace", "--group-size", "3", "--passes", "1000000", at=tmp_path) as process:
        try:
            while len(ranks := of_ranks(process.pid)) < 3 or len([*tmp_path.glob("*/group/rank-*")]) < running:
                assert process.poll() is None, process.communicate()
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out, err) == INTERRUPTED
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")] == []  # torch's own


def of_ranks(parent: int) -> list[str]:
    """The processes that it has spawned to run something, by their command lines."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [child for child in children if b"spawn_main" in command_line(child)]


def command_line(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
