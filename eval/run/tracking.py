"""Tracking by Weights & Biases: `--report_to wandb`, offline with WANDB_MODE=offline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from eval.commands import python
from quant.errors import UserError

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig

PROJECT = "mixed-precision-search"
"""Default of the environment variable WANDB_PROJECT."""


def check_tracking(config: RunConfig) -> None:
    """Check that `--report_to wandb` can start without asking the user for input.

    Raises:
        UserError: The package is not installed, or there is no key.
    """
    if config.report_to != "wandb":
        return
    found = find_spec("wandb")
    if found is None or found.origin is None:  # wandb writes to a folder `wandb`, which is found as a namespace package
        raise UserError(f"--report_to wandb: the package is not installed: {python()} -m pip install wandb")
    if os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        if not wandb.login(prompt=False):
            raise UserError("--report_to wandb: no key found: wandb login, or set WANDB_MODE=offline")


@contextmanager
def tracked(config: RunConfig) -> Iterator[None]:
    """Log to a W&B run with the name and the flags of this run while the block runs; its files go to the run folder."""
    if config.report_to != "wandb":
        yield
        return
    import wandb

    config.run_folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.run_name,
        group=config.exp_name,
        dir=config.run_folder,
        mode=os.environ.get("WANDB_MODE"),  # type: ignore[arg-type]  # else wandb uses its value at the first import
        config={entry.name: getattr(config, entry.name) for entry in fields(config)},
    ):
        yield
