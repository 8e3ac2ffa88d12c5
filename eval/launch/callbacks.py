"""What Tune tells the person who waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune import Callback
from rich.console import Console

from eval.config.run_config import RunConfig
from eval.launch.grid import STOPPED
from eval.launch.trial import record_failure, with_settings


class Notices(Callback):
    """Says when a run starts again because its process died, keeps why it died for good, records an early stop."""

    def __init__(self, runs: Mapping[str, RunConfig], console: Console) -> None:
        self._runs, self._console = runs, console
        self.died: dict[str, str] = {}
        """why a run ended without a record, by its name in the launch"""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, name = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            self._console.print(f"{name}: its process died; it starts again from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, name = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            self.died[name] = f"its process died {trial.num_failures} times; see {run.run_folder / 'run.log'}"

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, _ = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            step = trial.last_result.get("step", 0)
            record_failure(run, f"{STOPPED} at step {step}: --asha saw the others do better")

    def run_of(self, trial: Any) -> tuple[RunConfig, str]:
        """A trial's run, and what the launch calls it."""
        base = trial.config["run"]
        run = with_settings(self._runs[base], trial.config)
        return run, base if run == self._runs[base] else run.run_name

    def __getstate__(self) -> dict[str, Any]:
        """Tune copies its callbacks to disk; a terminal cannot go there, and nothing reads the copy."""
        return {}
