"""Ray Tune callbacks that report crashed, restarted and early-stopped runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune import Callback
from rich.console import Console

from eval.config.run_config import RunConfig
from eval.launch.grid import STOPPED
from eval.launch.trial import record_failure, with_settings


class TrialCallbacks(Callback):
    """Reports restarts of crashed runs, collects the reasons of final crashes and records early stops.

    Args:
        runs: Runs of the launch by name.
        console: Console that restarts are reported on.
    """

    def __init__(self, runs: Mapping[str, RunConfig], console: Console) -> None:
        self._runs, self._console = runs, console
        self.died: dict[str, str] = {}
        """Name of a run in the launch -> why it ended without a record."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report that a run restarts from its last checkpoint."""
        run, name = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            self._console.print(f"{name}: its process died; it starts again from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember why a run failed after its last restart."""
        run, name = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            self.died[name] = f"its process died {trial.num_failures} times; see {run.run_folder / 'run.log'}"

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write a record for a run that the scheduler stopped early, which has not written one itself."""
        run, _ = self.run_of(trial)
        if not (run.run_folder / "result.json").exists():
            step = trial.last_result.get("step", 0)
            record_failure(run, f"{STOPPED} at step {step}: --asha saw the others do better")

    def run_of(self, trial: Any) -> tuple[RunConfig, str]:
        """Return the run of a trial and its name in the launch."""
        base = trial.config["run"]
        run = with_settings(self._runs[base], trial.config)
        return run, base if run == self._runs[base] else run.run_name

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune saves its callbacks, a console cannot be pickled, and nothing reads the copy."""
        return {}
