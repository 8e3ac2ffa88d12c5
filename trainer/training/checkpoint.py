"""Checkpoints without pickles: optimizer, schedule and random generators as safetensors and JSON.

A state dict is split into its tensors (safetensors, named by their path) and everything else (JSON).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
"""Key of a file's metadata with further names of its tensors, as JSON."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be resumed: a file is missing or damaged."""


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to path.safetensors and path.json, each atomically."""
    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    save_tensors(tensors, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), plain)


def load_state(path: Path) -> dict[str, Any]:
    """Read the files of `save_state`. Raises CheckpointError if one is missing or damaged."""
    tensors, file = load_tensors(path.with_suffix(".safetensors")), path.with_suffix(".json")
    with _flaws_of(file):
        return _join(json.loads(file.read_text()), tensors)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a state dict as model.safetensors; a tensor with several names is stored once, with all of its names."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    stored: set[int] = set()
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and (owner := first.setdefault(place, name)) != name:
            tied[name] = owner
        else:
            own = tensor.detach().cpu().contiguous()
            part = own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in stored
            tensors[name] = own.clone() if part else own  # safetensors refuses tensors that share memory
            stored.add(tensors[name].data_ptr())
    metadata = {"format": "pt", TIED: json.dumps(tied)} if tied else None  # transformers requires a format
    save_tensors(tensors, folder / "model.safetensors", metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file under each of its names. Raises the errors of `safe_open`."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors | {name: tensors[owner] for name, owner in _tied_in(file).items()}


def _tied_in(file: Any) -> dict[str, str]:
    """Return further name -> stored name of the tensors of an open file."""
    tied: dict[str, str] = json.loads((file.metadata() or {}).get(TIED, "{}"))
    return tied


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint. Raises CheckpointError if the file is missing or damaged."""
    with _flaws_of(path):
        return read_tensors(path)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape without reading the tensors. Raises CheckpointError as `load_tensors` does."""
    with _flaws_of(path), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes | {name: shapes[owner] for name, owner in _tied_in(file).items()}


@contextmanager
def _flaws_of(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.parent} is incomplete: no {path.name}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: {path.name}: {error}") from None


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        # JSON has only string keys, but an optimizer's state has integer keys.
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
    """Return the state of the global generators of Python, numpy and torch."""
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
    """Restore the global generators from a `random_state`."""
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
