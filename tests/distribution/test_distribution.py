"""What is built and installed, tested where the repository is not: ``make dist-test`` copies this file and runs it.

``DIST`` names the folder with the sdist and the wheels that were built; this machine's is installed here.
"""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

if "DIST" not in os.environ:
    pytest.skip("runs in an environment of its own: make dist-test", allow_module_level=True)

DIST = Path(os.environ["DIST"])
COMMAND = Path(sysconfig.get_path("scripts")) / "vmm-dwdp"
SITE = Path(sysconfig.get_path("purelib"))
NEEDED = {
    "vmm_dwdp/py.typed",
    "vmm_dwdp/allocator/driver.py",  # through a symbolic link of the repository, as is the next
    "vmm_dwdp/allocator/_native.c",
    "vmm_dwdp/allocator/_native.pyi",
    "vmm_dwdp/allocator/_issue_thread.c",
    "vmm_dwdp/allocator/_issue_thread.h",
    "vmm_dwdp/kernels/cute/sm90.py",
    "vmm_dwdp/models/bytes-moe/config.json",
    "vmm_dwdp/models/bytes-moe/model.safetensors",
    "vmm_dwdp/planning/presets/gpus/h100.yaml",
    "vmm_dwdp/planning/presets/models/deepseek-r1-fp8.yaml",
}
PUBLIC = {
    "vmm_dwdp": None,
    "vmm_dwdp.kernels": None,
    "vmm_dwdp.stats": ("CacheStats", "CopyPath", "MemoryNeeded"),
    "vmm_dwdp.mode_choice": ("ModeChoice",),
    "vmm_dwdp.allocator.handles": ("Ledger",),
    "vmm_dwdp.metrics": ("StatsCollector",),
    "vmm_dwdp.trace": ("Span", "Trace", "plot_traces", "write_traces"),
    "vmm_dwdp.testing": ("RankFailed", "run_group"),
    "vmm_dwdp.integrations.transformers": ("attach", "from_pretrained"),
    "vmm_dwdp.integrations.sglang": ("register",),
}  # the names that are promised; None: what __all__ says


COMPILED = "vmm_dwdp/allocator/_native.abi3.so"  # in wheels only
MACHINES = {"x86_64": 62, "aarch64": 183}  # and what an ELF header calls them (e_machine, at byte 18)


def wheel(machine: str) -> zipfile.ZipFile:
    (found,) = DIST.glob(f"*{machine}.whl")
    return zipfile.ZipFile(found)


def wheel_files(machine: str) -> set[str]:
    return {name for name in wheel(machine).namelist() if not name.endswith("/")}


def sdist_files() -> set[str]:
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def test_the_sdist_has_all_that_is_needed() -> None:
    assert sdist_files() >= NEEDED | {"README.md", "LICENSE", "pyproject.toml"}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_wheel_has_all_that_is_needed(machine: str) -> None:
    assert wheel_files(machine) >= NEEDED | {COMPILED}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_compiled_is_for_the_machine_and_any_python(machine: str) -> None:
    archive = wheel(machine)
    name = Path(str(archive.filename)).name

    assert int.from_bytes(archive.read(COMPILED)[18:20], "little") == MACHINES[machine]
    assert re.fullmatch(rf"vmm_dwdp-[\d.]+-cp311-abi3-(manylinux\w+_{machine}\.?)+\.whl", name)


@pytest.mark.parametrize("machine", MACHINES)
def test_archives_have_the_same_package(machine: str) -> None:
    package = {name for name in wheel_files(machine) - {COMPILED} if name.startswith("vmm_dwdp/")}

    assert {name for name in sdist_files() if name.startswith("vmm_dwdp/")} == package


def test_every_archive_has_the_one_version() -> None:
    version = importlib.metadata.version("vmm-dwdp")

    assert importlib.import_module("vmm_dwdp").__version__ == version
    assert {
        path.name.partition("vmm_dwdp-")[2].removesuffix(".tar.gz").partition("-")[0] for path in DIST.iterdir()
    } == {version}


def test_extras_are_spelled_as_the_readme_says() -> None:
    asked = set(re.findall(r"pip install 'vmm-dwdp\[([\w-]+)\]'", str(importlib.metadata.metadata("vmm-dwdp"))))

    assert asked
    assert asked <= set(importlib.metadata.metadata("vmm-dwdp").get_all("Provides-Extra"))


def test_one_name_is_installed_at_the_top() -> None:
    top = {name.partition("/")[0] for machine in MACHINES for name in wheel_files(machine)}

    assert {name for name in top if not name.endswith(".dist-info")} == {"vmm_dwdp"}
    assert not (SITE / "kernels").exists()
    assert not (SITE / "allocator").exists()


@pytest.mark.parametrize(("module", "names"), PUBLIC.items(), ids=PUBLIC)
def test_public_names(module: str, names: tuple[str, ...] | None) -> None:
    imported = importlib.import_module(module)

    assert Path(str(imported.__file__)).is_relative_to(SITE)
    assert [name for name in names or imported.__all__ if not hasattr(imported, name)] == []


def test_the_runtime_imports_without_any_extra() -> None:
    absent = ("transformers", "accelerate", "sglang", "triton", "cutlass", "matplotlib", "prometheus_client")
    imports = "from vmm_dwdp import *; import vmm_dwdp.cli, vmm_dwdp.testing"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {imports}"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor() -> None:
    printed = subprocess.run([COMMAND, "doctor", "--json"], capture_output=True, text=True, check=True).stdout

    found = json.loads(printed)
    assert found["versions"]["vmm-dwdp"] == importlib.metadata.version("vmm-dwdp")
    assert found["native_thread"] == {"why_not": None}


def test_plan_finds_its_presets() -> None:
    command = [COMMAND, "plan", "qwen3-30b-a3b", "--gpu", "h100", "--group-size", "4", "--tokens", "8192", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(printed)


def test_demo() -> None:
    command = [COMMAND, "demo", "--group-size", "2", "--device", "cpu", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(printed)["identical"] is True


def test_the_last_script_of_the_readme(tmp_path: Path) -> None:
    readme = importlib.metadata.metadata("vmm-dwdp").get_payload()
    scripts = re.findall(r"```python\n(.*?)```", str(readme), re.DOTALL)
    (tmp_path / "first.py").write_text(scripts[-1])

    command = [sys.executable, "first.py"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert printed == "[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]\n"
