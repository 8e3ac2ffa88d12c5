"""Where a model stands on this machine, and what runs of it are called. Nothing here imports torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eval import transformer_utils, vision_utils
from eval.config.files import is_path
from quant.errors import UserError
from trainer.training.saved_files import QUANTIZATION

SAYS_NOTHING = re.compile(r"(model|checkpoint|weights|best|last|final|output|export|saved)([-_ ]?\d+)?", re.IGNORECASE)
"""names of folders that many models have"""


def is_folder(model: str) -> bool:
    """Whether --model means a local folder: a name that is known stays one, whatever stands in the working folder."""
    return model not in transformer_utils.MODELS and model not in vision_utils.MODELS and is_path(model)


def saved_model(path: str | Path) -> Path | None:
    """The folder of the saved model that `path` names: a run's folder, the `model` in it, or the weights file there."""
    path = Path(path).expanduser()
    places = [path.parent] if path.is_file() else [path / "model", path]
    return next((place for place in places if (place / QUANTIZATION).is_file()), None)


def starting_model(config: Any) -> tuple[str, Path] | None:
    """The saved model that a run starts from and the flag, with its value, that names it; None where none does.

    --load_model_path wins: beside it, --model_path and --model say where the architecture of both once came from.
    """
    for flag in ("load_model_path", "model_path", "model"):
        path = getattr(config, flag, None)
        if flag == "model" and (getattr(config, "from_scratch", False) or not is_folder(str(path))):
            continue  # a name, or a folder that lends its architecture alone
        if path is not None and (folder := saved_model(path)) is not None:
            return f"--{flag} {path}", folder
    return None


def description(folder: Path, subject: str) -> dict[str, Any]:
    """What a saved model says of itself; UserError that names `subject` where the file is damaged."""
    try:
        described = json.loads((folder / QUANTIZATION).read_text())
        return {**described, "build": dict(described.get("build") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{subject}: {QUANTIZATION} is damaged: {error}") from None


def model_name(config: Any) -> str:
    """What the run's folder and tables call the model: by its name, its run's, or its architecture and folder."""
    if config.model and not is_folder(config.model):
        return config.model
    if (start := starting_model(config)) is not None:
        subject, folder = start
        build = description(folder, subject)["build"]
        name = build.get("name") or build.get("model")  # runs before there was a name have a model at most
        return str(name) if name and not is_folder(str(name)) else folder_name(folder)
    return folder_name(Path(config.model or str(config.model_path)))


def folder_name(folder: Path) -> str:
    """A model's folder as a name: its architecture, where the folder does not say that, and as many parents as it takes
    until one says something. /runs/mine/model with a Llama in it is 'llama-mine-model'."""
    folder = folder.expanduser().resolve()
    names = [folder.name]
    for parent in folder.parents:
        if not SAYS_NOTHING.fullmatch(names[0]) or not parent.name:
            break
        names.insert(0, parent.name)
    architecture = architecture_of(folder)
    said = not architecture or architecture.lower() in "-".join(names).lower()
    return "-".join(names if said else [architecture, *names])


def architecture_of(folder: Path) -> str:
    """What transformers calls the architecture of a folder's config.json; "" where nothing says it."""
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # loading the model will say what is wrong
    return found if isinstance(found, str) else ""
