"""The presets: one YAML file each, with the source of every number."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import yaml

from vmm_dwdp.errors import ConfigError

Kind = Literal["models", "gpus"]


def preset_names(kind: Kind) -> list[str]:
    """The names that `load_preset` knows, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in (files(__name__) / kind).iterdir())


def load_preset(kind: Kind, name: str) -> dict[str, Any]:
    """The mapping in a preset's file; raises `ConfigError` with the known names if there is no such preset."""
    known = preset_names(kind)
    if name.lower() not in known:
        raise ConfigError(f"there is no preset or file {name!r} among the {kind}; the presets are {', '.join(known)}")
    return dict(yaml.safe_load((files(__name__) / kind / f"{name.lower()}.yaml").read_text(encoding="utf-8")))


def read_mapping(path: str | PathLike[str]) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; raises `ConfigError` otherwise."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values
