"""Debian packages and wheels, downloaded by their own clients and unpacked: where the texts for training come from.

Needs pip, and on the path ``apt-get`` and ``dpkg-deb`` of a Debian whose package lists are up to date.
"""

import subprocess
import zipfile
from pathlib import Path


def debian_package(name: str, folder: Path) -> Path:
    """Downloads a package of the Debian release that runs, and returns the new folder its files are unpacked in."""
    unpacked = folder / name
    subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["dpkg-deb", "-x", *folder.glob(f"{name}_*.deb"), unpacked], check=True)
    return unpacked


def debian_version(name: str, folder: Path) -> str:
    """The version of what ``debian_package`` downloaded into that folder."""
    (archive,) = folder.glob(f"{name}_*.deb")
    return subprocess.run(
        ["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()


def wheel(requirement: str, folder: Path) -> Path:
    """Downloads a pure-Python wheel (``name==version``), and returns the new folder its files are unpacked in."""
    name = requirement.partition("==")[0]
    unpacked = folder / name
    subprocess.run(
        ["pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, requirement], check=True
    )
    (archive,) = (path for path in folder.glob("*.whl") if path.name.lower().startswith(f"{name.lower()}-"))
    with zipfile.ZipFile(archive) as files:
        files.extractall(unpacked)
    return unpacked
