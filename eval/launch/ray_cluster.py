"""Running trials on Ray: starting or joining a cluster, dividing its resources, and running Tune to the end."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from eval.commands import COMMANDS, ROOT
from eval.config.run_config import RunConfig
from eval.config.validation import gpu_count
from eval.launch.private import LOOPBACK, keep_token_private, own_folder
from eval.launch.trial import Runner, one_line, trial
from quant.errors import UserError

MAX_FAILURES = 2
"""Number of restarts, from the last checkpoint, of a run whose process died."""
START_ATTEMPTS = 3
LOW_DISK = 16 << 20
"""Free bytes below which a failure is attributed to a full disk."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Share:
    """Resources of one run, and the number of concurrent runs."""

    cpus: float
    gpus: float
    concurrent: int


@contextmanager
def ray_session(config: RunConfig) -> Iterator[str | None]:
    """Start Ray on this machine while the block runs, or connect to the cluster at `--ray_address`.

    Ray's workers search the folder that Ray was started in for packages first. The user's folder may contain a package
    named `policy` or `eval`, so Ray is started in the root of this project; paths in the flags are absolute anyway.

    Yields:
        The address of Ray's dashboard; None if it has none.

    Raises:
        UserError: The cluster does not answer, or Ray did not start on this machine in time.
    """
    with ExitStack() as session:
        here = config.ray_address is None
        environment = _ENVIRONMENT | (LOOPBACK if here else {})
        os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
        folder = session.enter_context(own_folder()) if here else None
        import ray  # reads the environment

        session.callback(ray.shutdown)
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if here:
            keep_token_private()
            node = local_node(config)
            joined = _start_here(num_cpus=int(node["CPU"]), num_gpus=int(node["GPU"]), _temp_dir=folder, **quiet)
        else:
            joined = _join_cluster(str(config.ray_address), **quiet)
        for name in ("ray.tune", "ray.air", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield joined.dashboard_url or None


def _join_cluster(address: str, **settings: Any) -> Any:
    """Connect to the cluster at `address` and return what `ray.init` returns; UserError if it does not answer."""
    import ray

    try:
        with chdir(ROOT):
            return ray.init(address=address, **settings)
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        hint = "; a cluster that asks for a token needs RAY_AUTH_MODE=token" if "uthenticat" in str(error) else ""
        raise UserError(f"--ray_address {address}: {' '.join(str(error).split())[:300]}{hint}") from None


def _start_here(**settings: Any) -> Any:
    """Start Ray on this machine and return what `ray.init` returns.

    Ray gives its processes 30 s to start, which is too short on a busy machine, so a failed start is repeated.
    """
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with chdir(ROOT):
                return ray.init(address="local", **settings)
        except Exception as error:  # Ray raises a plain Exception for a timeout
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            ray.shutdown()
            print(f"attempt {attempt} at starting Ray: {one_line(error)}")
            reason = one_line(error)[:300]
    raise UserError(f"Ray did not start on this machine in {START_ATTEMPTS} attempts, is it very busy? {reason}")


def check_request(config: RunConfig, runs: int) -> Share | None:
    """Check the requested resources against this machine.

    Args:
        config: Flags of the launch.
        runs: Number of runs.

    Returns:
        The share of each run; None for a cluster, whose resources are known only after `join`.

    Raises:
        UserError: The flags request more than this machine has, or the cluster does not answer.
    """
    if config.gpus_per_trial is not None and config.gpus_per_trial > 1:
        raise UserError(
            f"--gpus_per_trial {config.gpus_per_trial:g}: a run of the launcher uses at most one GPU; "
            f"for one run over several: torchrun --nproc_per_node N {COMMANDS['mpq-run'][0]} ..."
        )
    if config.ray_address is not None:
        _check_address(config.ray_address)
        return None
    for flag, have in (("num_cpus", os.cpu_count() or 1), ("num_gpus", gpu_count(config.cuda_visible_devices))):
        wanted = getattr(config, flag)
        if wanted is not None and wanted > have:
            raise UserError(f"--{flag} {wanted}: this machine has {have}")
    return plan_share(config, [local_node(config)], runs)


def _check_address(address: str) -> None:
    """Check that something listens at `address`, because Ray's own client takes half a minute to report a failure."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UserError(f"--ray_address {address}: start the launcher on one of the cluster's machines, with 'auto'")
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise UserError(f"--ray_address {address}: choices: auto, or HOST:PORT of the head node")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray_address {address}: no cluster answers: {error}") from None


def local_node(config: RunConfig) -> dict[str, float]:
    """Return the resources of this machine that the launch may use, by Ray's names."""
    gpus = gpu_count(config.cuda_visible_devices) if config.num_gpus is None else config.num_gpus
    return {"CPU": config.num_cpus or os.cpu_count() or 1, "GPU": gpus}


def plan_share(config: RunConfig, nodes: Sequence[Mapping[str, float]], runs: int) -> Share:
    """Divide the resources of `nodes` among runs.

    By default each run gets one GPU if there are GPUs, and an equal part of the cores of its node.

    Args:
        config: Flags of the launch.
        nodes: Resources of each machine, by Ray's names.
        runs: Number of runs.

    Raises:
        UserError: No machine has the resources of one run.
    """
    usable = [node for node in nodes if node.get("CPU", 0) > 0]
    gpus = config.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in usable) else 0.0
    fitting = [node for node in usable if node.get("GPU", 0) >= gpus]
    cpus = config.cpus_per_trial
    if cpus is None and fitting:
        sharing = [min(_runs_on_gpus(node, gpus) if gpus else 1, runs) for node in fitting]
        cpus = max(1.0, min(node["CPU"] // number for node, number in zip(fitting, sharing, strict=True)))
    fitting = [node for node in fitting if node["CPU"] >= (cpus or 0)]
    if not fitting or cpus is None:
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise UserError(
            f"no machine can hold a run of {cpus or 1:g} CPU and {gpus:g} GPU (per machine: {have or 'nothing'})"
        )
    slots = sum(min(int(n["CPU"] / cpus), _runs_on_gpus(n, gpus) if gpus else runs) for n in fitting)
    if config.ray_address is not None:  # the launch may use only a part of the cluster
        if config.num_cpus is not None:
            slots = min(slots, int(config.num_cpus / cpus))
        if config.num_gpus is not None and gpus:
            slots = min(slots, _runs_on_gpus({"GPU": config.num_gpus}, gpus))
    return Share(cpus, gpus, max(1, min(slots, runs)))


def _runs_on_gpus(node: Mapping[str, float], share: float) -> int:
    """Return how many runs fit on the GPUs of a node if each needs the given share of one GPU."""
    return int(node.get("GPU", 0)) * int(1 / share + 1e-9)


def join(config: RunConfig, folder: Path, runs: Sequence[RunConfig]) -> Share:
    """Divide the resources of the connected cluster among the runs.

    Args:
        config: Flags of the launch.
        folder: Folder of the launch.
        runs: Its runs.

    Raises:
        UserError: A machine of the cluster has no access to the folders of the runs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    share = plan_share(config, [node["Resources"] for node in nodes], len(runs))
    paths = {str(folder)} | {
        path for run in runs for path in (run.data_dir, run.model_path, run.load_model_path) if path
    }
    find_missing = ray.remote(num_cpus=0)(_missing_paths)
    answers = {
        node["NodeManagerHostname"]: find_missing.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(sorted(paths))
        for node in nodes
    }
    for host, answer in answers.items():
        if missing := ray.get(answer):
            raise UserError(f"--ray_address: the machine {host} does not see {missing[0]}: keep it on shared storage")
    return share


def _missing_paths(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def fit(
    runs: Mapping[str, RunConfig],
    share: Share,
    storage: Path,
    console: Console,
    runner: Runner | None = None,
    param_space: dict[str, Any] | None = None,
    **tune_config: Any,
) -> dict[str, str]:
    """Run every trial to its end, or until Ctrl-C.

    Args:
        runs: Runs by name.
        share: Resources of each run.
        storage: Folder for the files of Tune. Only its TensorBoard events are kept, because the run records, not the
            pickles of Tune, say which runs are finished.
        console: Console for reports of restarts.
        runner: Replaces `eval.eval_run.run`.
        param_space: Search space of Tune; by default one trial per run.
        **tune_config: Further arguments of `tune.TuneConfig`.

    Returns:
        Name -> reason, for the runs whose process ended without a record.
    """
    from ray import tune
    from ray.tune.logger import TBXLoggerCallback

    from eval.launch.callbacks import TrialCallbacks

    callbacks = TrialCallbacks(runs, console)
    clean(storage)
    storage.mkdir(parents=True, exist_ok=True)

    def name_of_trial(trial: Any) -> str:
        return callbacks.run_of(trial)[1].replace("/", "-")

    function = tune.with_parameters(trial, runs=dict(runs), runner=runner)
    tuner = tune.Tuner(
        tune.with_resources(function, {"cpu": share.cpus, "gpu": share.gpus}),
        param_space=param_space or {"run": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=share.concurrent,
            reuse_actors=True,  # importing torch and transformers in a new process takes longer than a short run
            trial_name_creator=name_of_trial,
            trial_dirname_creator=name_of_trial,
            **tune_config,
        ),
        run_config=tune.RunConfig(
            name=datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[TBXLoggerCallback(), callbacks],
            verbose=0,
        ),
    )
    died = callbacks.died
    try:
        tuner.fit()
    except (EOFError, OSError):
        if not disk_is_full(storage):
            raise  # on a full disk, Tune fails to read back its own truncated file
    finally:
        clean(storage)
    if disk_is_full(storage):
        without = [name for name, run in runs.items() if not (run.run_folder / "result.json").exists()]
        died |= dict.fromkeys([*died, *without], "the disk is full")
    return died


def disk_is_full(folder: Path) -> bool:
    """Whether less than LOW_DISK bytes are free."""
    return shutil.disk_usage(folder).free < LOW_DISK


def clean(storage: Path) -> None:
    """Remove the files of Tune in `storage`, except TensorBoard events."""
    for path in sorted(storage.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif not path.name.startswith("events.out.tfevents"):
            path.unlink()
