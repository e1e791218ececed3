"""Where a model is on this machine, and its ``config.json``: what can be said of it in a moment, without torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

from vmm_dwdp.errors import ConfigError

CONFIG_FILE: Final = "config.json"
_HUB_NAME: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # organisation/model


def find_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model.

    Args:
        model: the folder, in which ``~`` is the user's home; or a name as Hugging Face's hub has them, of a model that
            was downloaded into huggingface_hub's cache. Nothing is downloaded.
        revision: of a model in that cache, a branch or a commit; by default its main branch as it was downloaded last.

    Raises:
        ConfigError: it is neither; the sentence says what would get it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(str(model)) or folder.exists():
        raise ConfigError(f"there is no directory {folder}")
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"there is no directory {folder}; if that is a model of Hugging Face's hub, pip install 'vmm-dwdp[hf]' and "
            f"then hf download {model}"
        ) from None
    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        which = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"there is no directory {folder}, and no model of that name in {constants.HF_HUB_CACHE}: "
            f"hf download {model}{which} puts it there"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face model; raises `ConfigError` if the folder is of none."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} is not the folder of a Hugging Face model: it has no {CONFIG_FILE}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
