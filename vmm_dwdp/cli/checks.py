"""What a user can get wrong, found out before the work and not after it, where possible before torch is imported."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Literal

from vmm_dwdp.errors import ConfigError, DWDPError
from vmm_dwdp.model_folder import find_folder, read_config


def number_or_auto(text: str) -> int | Literal["auto"]:
    """The value of an option that takes either."""
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, not {text!r}") from None


def slice_bytes(text: str) -> int | Literal["auto", "streams"]:
    """The value of an option that takes what the config's ``slice_bytes`` takes; some numbers only it refuses."""
    if text == "streams":
        return "streams"
    try:
        return number_or_auto(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"a whole number, auto or streams, not {text!r}") from None


def why_no_gpu() -> str:
    """Why there is none, where torch finds none."""
    import torch

    from vmm_dwdp.allocator import open_driver

    try:
        open_driver(torch.device("cuda"))
    except (DWDPError, ImportError) as error:
        return str(error)
    return "torch finds no CUDA device"


def require_device(device: str) -> None:
    """Raise `ConfigError` if ``--device cuda`` was given where there is no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda needs a GPU: {why_no_gpu()}")


def require_model(model: str | os.PathLike[str]) -> Path:
    """The folder of a model, see `find_folder`; raises `ConfigError` if it is of none, as far as is seen at once."""
    folder = find_folder(model)
    if not isinstance(read_config(folder).get("model_type"), str):
        raise ConfigError(f"{folder} is not the folder of a Hugging Face model: its config.json names no model_type")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no safetensors files")
    return folder


def require_writable(option: str, path: Path | None) -> None:
    """Raise `ConfigError` if the file that ``option`` names, if any, cannot be written; it is not touched."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written: this user may not")
