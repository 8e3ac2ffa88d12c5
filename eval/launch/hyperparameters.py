"""Ray Tune algorithms for our runs: early stopping by ASHA, hyperparameter search by Optuna."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Sequence
from typing import Any

from eval.config.run_config import RUN_FILE, RunConfig
from eval.launch.grid import RunState, differences, read_config, read_state
from eval.launch.trial import TUNED, objective, with_settings
from quant.errors import UserError

GRACE = 5
"""ASHA stops no run during the first 1/GRACE of its steps."""
REDUCTION = 2
"""ASHA keeps the best 1/REDUCTION of the runs at each rung."""
RANGES = {"cost_beta": (0.1, 10.0), "rl_learning_rate": (0.005, 0.5), "max_entropy_beta": (0.001, 0.1)}
"""Setting -> range that --hpo samples from, log-uniformly."""


def check_tuning(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Check that --hpo has exactly one search run to tune.

    Raises:
        UserError: There are several runs, the method is not a search, or Optuna is not installed.
    """
    if config.hpo is None:
        return
    if len(runs) > 1 or runs[0].method != "search":
        kind = f"{len(runs)} runs" if len(runs) > 1 else f"a {runs[0].method} run"
        raise UserError(f"--hpo {config.hpo} tunes the settings of one search, and the flags make {kind}")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--hpo needs Optuna: pip install optuna")


def early_stopping(steps: Sequence[int]) -> dict[str, Any]:
    """Return the Tune settings of --asha, which compares runs by their score at the same steps.

    Args:
        steps: Number of steps of each run.
    """
    from ray.tune.schedulers import ASHAScheduler

    longest = max(1, *steps)
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=longest,
        grace_period=max(1, longest // GRACE),
        reduction_factor=REDUCTION,
        stop_last_trials=False,  # a run must still be evaluated after its last step
    )
    return {"scheduler": scheduler}


def hyperparameter_search(base: RunConfig, trials: int) -> dict[str, Any]:
    """Return the Tune settings of --hpo, with the results of earlier launches as starting points.

    Args:
        base: The run whose settings are tuned.
        trials: Total number of trials, including those of earlier launches.

    Returns:
        Keyword arguments of `ray_cluster.fit`; empty if earlier launches already made all trials.
    """
    from optuna.distributions import FloatDistribution
    from ray.tune.search.optuna import OptunaSearch

    earlier = tried(base)
    if len(earlier) >= trials:
        return {}
    finished = [state for state in earlier if state.run is not None]
    search = OptunaSearch(
        space={name: FloatDistribution(low, high, log=True) for name, (low, high) in RANGES.items()},
        metric="objective",
        mode="max",
        points_to_evaluate=[{name: getattr(state.config, name) for name in TUNED} for state in finished] or None,
        evaluated_rewards=[objective(state.run.record) for state in finished if state.run is not None] or None,
        seed=base.seed + len(earlier),  # the same seed would sample the first settings again
    )
    return {"search_alg": search, "num_samples": trials - len(earlier), "param_space": {"run": base.run_name}}


def tried(base: RunConfig) -> list[RunState]:
    """List the runs that --hpo has made of `base` so far."""
    found = []
    for path in sorted(base.experiment_folder.glob(f"{glob.escape(base.run_name)}-*/{RUN_FILE}")):
        run = read_config(path.parent)
        settings = {name: getattr(run, name) for name in TUNED}
        if run.run_id == with_settings(base, settings).run_id and not differences(base.updated(**settings), run):
            found.append(read_state(run.updated(output_root_dir=base.output_root_dir, exp_name=base.exp_name)))
    return found


def best(runs: Sequence[RunState]) -> RunState | None:
    """Return the finished run with the best metric; None if no run is finished."""
    finished = [state for state in runs if state.run is not None]
    return max(finished, key=lambda state: objective(state.run.record) if state.run else 0.0, default=None)
