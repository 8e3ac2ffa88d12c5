"""Files of a launch: its flags, for `--resume`, and locks against a second launch in the same folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eval.config.parser import read_flags, resumed, to_yaml
from eval.config.run_config import LAUNCH_FILE, RunConfig
from eval.launch.grid import expand, read_state
from eval.run.lock import exclusive_lock
from quant.errors import UserError


def read_launch(argv: Sequence[str]) -> RunConfig:
    """Parse the flags of a launch, on top of the saved flags if `--resume` is given.

    Raises:
        UserError: A flag is invalid, or the folder of `--resume` holds no launch.
    """
    config = read_flags(argv)
    if config.resume is None:
        return config
    folder = Path(config.resume).expanduser().resolve()
    path = folder / LAUNCH_FILE
    if folder.is_file():  # flags of an earlier launch, see `write_launch`
        folder, path = folder.parent, folder
    if not path.exists():
        raise UserError(f"--resume {config.resume}: no {LAUNCH_FILE} there; name the folder of a launch")
    # The folder may have been moved: its current place is <output_root_dir>/<task>/<exp_name>.
    return resumed(path, argv, {"output_root_dir": str(folder.parents[1]), "exp_name": folder.name})


def write_launch(folder: Path, config: RunConfig, runs: Sequence[RunConfig]) -> Path | None:
    """Write the flags of this launch for `--resume`, and keep those of an unfinished earlier launch.

    Args:
        folder: Folder of the launch.
        config: Its flags.
        runs: Its runs.

    Returns:
        The file with the flags of the earlier launch, which `--resume` accepts; None if no such launch has unfinished
        runs.
    """
    path, text, kept = folder / LAUNCH_FILE, to_yaml(config), None
    if path.exists() and path.read_text() != text and _left_to_do(path, runs):
        numbers = itertools.count(1)
        kept = next(file for n in numbers if not (file := path.with_suffix(f".{n}.yaml")).exists())
        path.replace(kept)
    for file in folder.glob("launch.*.yaml"):
        if file.read_text() == text:  # this launch resumes that one
            file.unlink()
    path.write_text(text)
    return kept


def _left_to_do(path: Path, runs: Sequence[RunConfig]) -> bool:
    """Whether the launch saved in `path` has unfinished runs that are not among `runs`."""
    own_folders = {run.run_folder for run in runs}
    try:
        other = read_launch(["--resume", str(path)])
        others = [run for run in expand(other) if run.run_folder not in own_folders]
        return any(other.hpo is not None or not read_state(run).finished for run in others)
    except UserError:  # its data or model is gone; resuming it will report that
        return True


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Lock every folder while the block runs, creating missing ones.

    Raises:
        UserError: Another launch holds one of the locks, or a folder is not writable.
    """
    with ExitStack() as locks:
        for folder in folders:
            try:
                locks.enter_context(exclusive_lock(folder, "launch", "--exp_name"))
                probe = folder / ".probe"
                probe.write_bytes(b"\0" * 4096)
                probe.unlink()
            except OSError as error:
                raise UserError(f"--output_root_dir: cannot write in {folder}: {error.strerror}") from None
        yield


def set_aside(runs: Iterable[RunConfig]) -> None:
    """Rename the records of failed and damaged runs, because a run with a result.json counts as over."""
    for run in runs:
        path = run.run_folder / "result.json"
        if path.exists():
            path.replace(path.with_suffix(".json.old"))
