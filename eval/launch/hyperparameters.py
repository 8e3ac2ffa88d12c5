"""Tune's own algorithms over our runs: ASHA stops hopeless ones early, Optuna looks for better search settings."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Sequence
from typing import Any

from eval.config.run_config import RUN_FILE, RunConfig
from eval.launch.grid import Progress, differences, look_up, read_config
from eval.launch.trial import TUNED, objective, with_settings
from quant.errors import UserError

GRACE = 5
"""no run is stopped in the first 1/GRACE of its steps"""
REDUCTION = 2
"""at each rung the better half goes on"""
RANGES = {"cost_beta": (0.1, 10.0), "rl_learning_rate": (0.005, 0.5), "max_entropy_beta": (0.001, 0.1)}
"""what --hpo draws from, evenly on a logarithmic scale"""


def check_tuning(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Raises UserError for an --hpo that has nothing to tune."""
    if config.hpo is None:
        return
    if len(runs) > 1 or runs[0].method != "search":
        kind = f"{len(runs)} runs" if len(runs) > 1 else f"a {runs[0].method} run"
        raise UserError(f"--hpo {config.hpo} tunes the settings of one search, and the flags make {kind}")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--hpo needs Optuna: pip install optuna")


def early_stopping(steps: Sequence[int]) -> dict[str, Any]:
    """Tune's settings for --asha: runs are compared by how probable they find the truth, at the same steps."""
    from ray.tune.schedulers import ASHAScheduler

    longest = max(1, *steps)
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=longest,
        grace_period=max(1, longest // GRACE),
        reduction_factor=REDUCTION,
        stop_last_trials=False,  # a run at its last step still has to settle and to be evaluated
    )
    return {"scheduler": scheduler}


def hyperparameter_search(base: RunConfig, trials: int) -> dict[str, Any]:
    """Tune's settings for --hpo, empty when enough was tried: what earlier launches found is told to Optuna."""
    from optuna.distributions import FloatDistribution
    from ray.tune.search.optuna import OptunaSearch

    known = tried(base)
    if len(known) >= trials:
        return {}
    done = [one for one in known if one.run is not None]
    search = OptunaSearch(
        space={name: FloatDistribution(low, high, log=True) for name, (low, high) in RANGES.items()},
        metric="objective",
        mode="max",
        points_to_evaluate=[{name: getattr(one.config, name) for name in TUNED} for one in done] or None,
        evaluated_rewards=[objective(one.run.record) for one in done if one.run is not None] or None,
        seed=base.seed + len(known),  # the same seed would draw the first settings once more
    )
    return {"search_alg": search, "num_samples": trials - len(known), "param_space": {"run": base.run_name}}


def tried(base: RunConfig) -> list[Progress]:
    """The runs that --hpo has made of `base` so far."""
    found = []
    for path in sorted(base.experiment_folder.glob(f"{glob.escape(base.run_name)}-*/{RUN_FILE}")):
        run = read_config(path.parent)
        settings = {name: getattr(run, name) for name in TUNED}
        if run.run_id == with_settings(base, settings).run_id and not differences(base.updated(**settings), run):
            found.append(look_up(run.updated(output_root_dir=base.output_root_dir, exp_name=base.exp_name)))
    return found


def best(runs: Sequence[Progress]) -> Progress | None:
    """The finished run with the best metric."""
    finished = [known for known in runs if known.run is not None]
    return max(finished, key=lambda known: objective(known.run.record) if known.run else 0.0, default=None)
