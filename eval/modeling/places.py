"""Finds saved models on this machine, and names runs after their models. Nothing here imports torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eval import transformer_utils, vision_utils
from eval.config.files import is_path
from quant.errors import UserError
from trainer.training.saved_files import QUANTIZATION

GENERIC_NAMES = re.compile(r"(model|checkpoint|weights|best|last|final|output|export|saved)([-_ ]?\d+)?", re.IGNORECASE)
"""names of folders that do not identify a model"""


def is_folder(model: str) -> bool:
    """Return whether --model means a local folder. A known model name never does, even if such a folder exists."""
    return model not in transformer_utils.MODELS and model not in vision_utils.MODELS and is_path(model)


def saved_model(path: str | Path) -> Path | None:
    """Return the folder of a saved model, None if there is none.

    Args:
        path: a run's folder, its `model` folder, or the weights file in that.
    """
    path = Path(path).expanduser()
    places = [path.parent] if path.is_file() else [path / "model", path]
    return next((place for place in places if (place / QUANTIZATION).is_file()), None)


def starting_model(config: Any) -> tuple[str, Path] | None:
    """Find the saved model that a run starts from.

    --load_model_path takes precedence: next to it, --model_path and --model only name the architecture.

    Returns:
        The flag with its value, for errors, and the folder; None if the run starts from no saved model.
    """
    for flag in ("load_model_path", "model_path", "model"):
        path = getattr(config, flag, None)
        if flag == "model" and (getattr(config, "from_scratch", False) or not is_folder(str(path))):
            continue  # a name, or a folder of which only the architecture is used
        if path is not None and (folder := saved_model(path)) is not None:
            return f"--{flag} {path}", folder
    return None


def description(folder: Path, subject: str) -> dict[str, Any]:
    """Read quantization.json of a saved model; raise UserError that names `subject` if it is damaged."""
    try:
        described = json.loads((folder / QUANTIZATION).read_text())
        return {**described, "build": dict(described.get("build") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{subject}: {QUANTIZATION} is damaged: {error}") from None


def model_name(config: Any) -> str:
    """Return the model's name for folders and tables: that of --model, of the run it starts from, or of its folder."""
    if config.model and not is_folder(config.model):
        return config.model
    if (start := starting_model(config)) is not None:
        subject, folder = start
        build = description(folder, subject)["build"]
        name = build.get("name") or build.get("model")  # older runs have no "name"
        return str(name) if name and not is_folder(str(name)) else folder_name(folder)
    return folder_name(Path(config.model or str(config.model_path)))


def folder_name(folder: Path) -> str:
    """Derive a name from a model's folder.

    Parents are prepended while the first name is generic, such as `model`; so is the architecture, unless the name
    contains it: /runs/mine/model, which holds a Llama, becomes 'llama-mine-model'.
    """
    folder = folder.expanduser().resolve()
    names = [folder.name]
    for parent in folder.parents:
        if not GENERIC_NAMES.fullmatch(names[0]) or not parent.name:
            break
        names.insert(0, parent.name)
    architecture = architecture_of(folder)
    said = not architecture or architecture.lower() in "-".join(names).lower()
    return "-".join(names if said else [architecture, *names])


def architecture_of(folder: Path) -> str:
    """Return `model_type` of a folder's config.json, "" if there is none."""
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # loading the model reports the error
    return found if isinstance(found, str) else ""
