"""Describes the inputs and outputs of a saved model, for users who have the model but not its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from eval.data.dataset import TaskData
from eval.modeling.places import description, starting_model
from eval.tasks import Kind

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig
    from eval.modeling.bundle import ModelBundle, Pixels


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of one run's model, and the meaning of its outputs."""

    kind: Kind
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    """names of the classes in the order of the outputs; empty if the outputs are not classes"""
    regression: bool = False
    candidates: int = 0
    max_length: int | None = None
    """most tokens of a text"""
    max_target_length: int | None = None
    """most tokens of a summary"""
    pixels: Pixels | None = None


def to_json(inputs: ModelInputs) -> dict[str, Any]:
    """Convert to a dict for JSON."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(inputs)))  # lists, as a file has them
    return values


def from_json(saved: Mapping[str, Any]) -> ModelInputs:
    """Invert `to_json`, after JSON turned tuples into lists."""
    from eval.modeling.bundle import Pixels

    pixels = saved["pixels"]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    if pixels is not None:
        pixels = Pixels(**{**pixels, "mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])})
    return ModelInputs(**{**values, "pixels": pixels})


def agree_on_classes(data: TaskData, bundle: ModelBundle, config: RunConfig) -> TaskData:
    """Order the data's classes as the model does, and write their names into the model's configuration.

    A trained head fixes the order of its classes: 'negative' need not be its first output.

    Returns:
        The data, with renumbered labels if the order differs.
    """
    if not data.label_names or data.task.candidates:
        return data
    settings = getattr(bundle.model, "config", None)
    known = dict(getattr(settings, "id2label", None) or {})
    own = run_classes(config) or tuple(known[number] for number in sorted(known))
    if bundle.trained:
        data = in_order(data, own)
    if settings is not None:
        settings.id2label = dict(enumerate(data.label_names))
        settings.label2id = {name: number for number, name in enumerate(data.label_names)}
    return data


def run_classes(config: RunConfig) -> tuple[str, ...]:
    """Return the classes of the run that this one starts from; empty without such a run or without classes."""
    start = starting_model(config)
    if start is None:
        return ()
    subject, folder = start
    return tuple(description(folder, subject)["build"].get("inputs", {}).get("classes", ()))


def in_order(data: TaskData, names: tuple[str, ...]) -> TaskData:
    """Renumber the data's classes in the order of `names`, if both are the same set of names, ignoring case."""
    import numpy as np

    place = {str(name).casefold(): number for number, name in enumerate(names)}
    keys = [name.casefold() for name in data.label_names]
    if keys == list(place) or set(keys) != set(place) or len(keys) != len(names):
        return data
    order = np.array([place[key] for key in keys])

    def renumbered(split: Any) -> Any:
        numbers = order[np.asarray(split[data.task.label][:])]
        return split.remove_columns(data.task.label).add_column(data.task.label, numbers)

    called = [data.label_names[keys.index(key)] for key in place]
    return replace(
        data,
        train=renumbered(data.train),
        validation={name: renumbered(split) for name, split in data.validation.items()},
        label_names=called,
        notes=[*data.notes, f"classes in the order of the model's outputs: {', '.join(called[:10])}"],
    )
