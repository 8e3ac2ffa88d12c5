"""What the Trainer would write as pickles, as safetensors and JSON: optimizer, schedule and random generators.

A state dict is split into its tensors (safetensors, under their path) and everything else (JSON).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.training.atomic import write_atomically, write_json

_TENSOR = "$tensor"
TIED = "tied"
"""entry of a file's metadata: further names of the tensors in it, as JSON"""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued from: a file is missing or cannot be read."""


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to path.safetensors and path.json, each atomically."""
    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    save_tensors(tensors, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), plain)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises CheckpointError if a file is missing or damaged."""
    tensors = load_tensors(path.with_suffix(".safetensors"))
    file = path.with_suffix(".json")
    try:
        return _join(json.loads(file.read_text()), tensors)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent} is incomplete: no {file.name}") from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {file.name}: {error}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written atomically."""
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """A state dict as model.safetensors. A tensor with several names is stored once; the file holds its other names."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and (owner := first.setdefault(place, name)) != name:
            tied[name] = owner
        else:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    metadata = {"format": "pt", TIED: json.dumps(tied)} if tied else None  # transformers asks for a format
    save_tensors(tensors, folder / "model.safetensors", metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file under each of its names. Raises as `safe_open` does."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors | {name: tensors[owner] for name, owner in _tied_in(file).items()}


def _tied_in(file: Any) -> dict[str, str]:
    """Further name -> name that an open file stores a tensor under."""
    tied: dict[str, str] = json.loads((file.metadata() or {}).get(TIED, "{}"))
    return tied


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError if the file is missing or damaged."""
    try:
        return read_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent} is incomplete: no {path.name}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name}: {error}") from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a file, without reading the tensors. Raises as `load_tensors` does."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes | {name: shapes[owner] for name, owner in _tied_in(file).items()}
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent} is incomplete: no {path.name}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name}: {error}") from None


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        # JSON has string keys only; an optimizer's state is keyed by integers.
        return {"$items": [[key, _split(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _join(item, tensors) for key, item in value["$items"]}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value


def random_state() -> dict[str, Any]:
    """The global generators of Python, numpy and torch."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue the generators where `random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
