"""A user's file: models of one's own, each searched, saved, loaded and exported. Prints one JSON line a model.

`python tests/journeys/own_models.py FOLDER`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from eval.saved_model import load_model
from quant.export.onnx.export import export_onnx
from quant.export.packed import read_packed, restore, write_packed
from trainer.reinforce_trainer import ReinforceConfig, ReinforceTrainer

CLASSES = 3


class Base(nn.Module):
    """Two layers and a head."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, outputs)

    def loss(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else nn.functional.cross_entropy(logits, labels)


class TwoInputs(Base):
    def forward(self, left: Tensor, right: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.body(left) - self.body(right))
        return {"loss": self.loss(logits, labels), "logits": logits}


class Tuple(Base):
    def forward(self, left: Tensor, labels: Tensor | None = None) -> tuple[Any, ...]:
        logits = self.head(self.body(left))
        return (logits,) if labels is None else (self.loss(logits, labels), logits)


class WithoutLogits(Base):
    def forward(self, left: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        scores = self.head(self.body(left))
        return {"scores": scores, "loss": self.loss(scores, labels)}


class SeveralOutputs(Base):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(16, 2)

    def forward(self, left: Tensor, labels: Tensor | None = None, places: Tensor | None = None) -> dict[str, Any]:
        hidden = self.body(left)
        logits, place = self.head(hidden), self.place(hidden)
        loss = self.loss(logits, labels)
        if loss is not None and places is not None:
            loss = loss + (place - places).square().mean()
        return {"loss": loss, "logits": logits, "places": place, "hidden": [hidden]}


class Regression(Base):
    def __init__(self) -> None:
        super().__init__(outputs=1)

    def forward(self, left: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        value = self.head(self.body(left))
        return {"loss": None if labels is None else (value[:, 0] - labels).square().mean(), "logits": value}


class Bare(Base):
    """A tensor; the loss is computed beside the model."""

    def forward(self, left: Tensor) -> Tensor:
        return self.head(self.body(left))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "two inputs": (TwoInputs, ("left", "right", "labels")),
    "a tuple": (Tuple, ("left", "labels")),
    "a dict without logits": (WithoutLogits, ("left", "labels")),
    "several outputs": (SeveralOutputs, ("left", "labels", "places")),
    "a regression": (Regression, ("left", "labels")),
    "a tensor": (Bare, ("left", "labels")),
}


def rows(columns: tuple[str, ...], numbers: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % CLASSES
    left = torch.randn(80, 8, generator=generator) + labels[:, None]
    all_columns = {
        "left": left,
        "right": torch.randn(80, 8, generator=generator),
        "labels": left.sum(1) if numbers else labels,
        "places": left[:, :2].clone(),
    }
    return [{name: all_columns[name][row] for name in columns} for row in range(80)]


def bare_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


def main_tensor(outputs: Any) -> Tensor:
    """What a user looks at."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple):
        return outputs[-1]
    return outputs.get("logits", outputs.get("scores"))  # type: ignore[no-any-return]


def journey(folder: Path, build: Callable[[], nn.Module], columns: tuple[str, ...]) -> dict[str, Any]:
    data = rows(columns, numbers=build is Regression)
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=8, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="steps", save_steps=4, logging_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    trainer = ReinforceTrainer(
        build(),
        arguments,
        search=ReinforceConfig(target_bits=4.5, cost_type="memory", calibration_batches=2, sensitivity_examples=16),
        search_space="2,4,8",
        train_dataset=data,
        eval_dataset=data[:20],
        compute_loss_func=bare_loss if build is Bare else None,
    )
    trainer.train()
    criterion = trainer.evaluator.criterion
    told: dict[str, Any] = {"cost": trainer.cost, "target": trainer.cost_target, "judged_by": criterion}
    told["eval_loss"] = trainer.evaluate()["eval_loss"]
    told["predicted"] = len(main_tensor_of_predictions(trainer.predict(data[:20]).predictions))
    trainer.save_model(str(folder / "saved"))
    inputs = {name: torch.stack([row[name] for row in data[:4]]) for name in columns if name in ("left", "right")}
    with torch.no_grad():
        expected = main_tensor(trainer.model.eval()(**inputs))
        loaded = load_model(folder / "saved", build())
        told["loaded"] = float((main_tensor(loaded(**inputs)) - expected).abs().max())
        write_packed(folder / "packed.safetensors", trainer.model, trainer.modules)
        unpacked = build().eval()
        restore(unpacked, *read_packed(folder / "packed.safetensors"))
        told["unpacked"] = float((main_tensor(unpacked(**inputs)) - expected).abs().max())
    export_onnx(folder / "model.onnx", trainer.model, trainer.modules, inputs)
    told["onnx"] = float((run_onnx(folder / "model.onnx", inputs) - expected).abs().max())
    return told


def main_tensor_of_predictions(predictions: Any) -> Any:
    return predictions[0] if isinstance(predictions, tuple) else predictions


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    named = dict(zip((entry.name for entry in session.get_outputs()), session.run(None, feed), strict=True))
    return torch.from_numpy(next(named[name] for name in ("logits", "scores", "output_0") if name in named))


if __name__ == "__main__":
    for name, (build, columns) in MODELS.items():
        told = journey(Path(sys.argv[1]) / name.replace(" ", "-"), build, columns)
        print("JOURNEY", json.dumps({"model": name, **told}), flush=True)
