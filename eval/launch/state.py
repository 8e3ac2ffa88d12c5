"""What a launch keeps on disk: its flags, for `--resume`, and a lock, so that no second launch works beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eval.config.parser import read_flags, resumed, to_yaml
from eval.config.run_config import LAUNCH_FILE, RunConfig
from eval.launch.grid import expand, look_up
from eval.run.lock import alone_in
from quant.errors import UserError


def read_launch(argv: Sequence[str]) -> RunConfig:
    """The launch that `argv` asks for: its own flags, over those of the launch in the folder of `--resume`.

    Raises UserError where that folder holds no launch.
    """
    config = read_flags(argv)
    if config.resume is None:
        return config
    folder = Path(config.resume).expanduser().resolve()
    path = folder / LAUNCH_FILE
    if folder.is_file():  # an earlier launch's, see `write_launch`
        folder, path = folder.parent, folder
    if not path.exists():
        raise UserError(f"--resume {config.resume}: no {LAUNCH_FILE} there; name the folder of a launch")
    # <output_root_dir>/<task>/<exp_name> is where it is now.
    return resumed(path, argv, {"output_root_dir": str(folder.parents[1]), "exp_name": folder.name})


def write_launch(folder: Path, config: RunConfig, runs: Sequence[RunConfig]) -> Path | None:
    """The flags of this launch, for `--resume`; those of another one that is not finished are kept beside them.

    Returns the file of those, which `--resume` takes as well; None where nothing is left to do for another launch.
    """
    path, text, kept = folder / LAUNCH_FILE, to_yaml(config), None
    if path.exists() and path.read_text() != text and _left_to_do(path, runs):
        numbers = itertools.count(1)
        kept = next(file for n in numbers if not (file := path.with_suffix(f".{n}.yaml")).exists())
        path.replace(kept)
    for file in folder.glob("launch.*.yaml"):
        if file.read_text() == text:  # it is this launch that goes on
            file.unlink()
    path.write_text(text)
    return kept


def _left_to_do(path: Path, runs: Sequence[RunConfig]) -> bool:
    """Whether the launch of a file has runs that are not finished, apart from `runs`."""
    mine = {run.run_folder for run in runs}
    try:
        other = read_launch(["--resume", str(path)])
        theirs = [run for run in expand(other) if run.run_folder not in mine]
        return any(other.hpo is not None or not look_up(run).finished for run in theirs)
    except UserError:  # what it needs is gone: who wants to go on with it will be told
        return True


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Holds every folder for this launch, making it where there is none.

    Raises UserError where another launch holds one, or where nothing can be written.
    """
    with ExitStack() as held:
        for folder in folders:
            try:
                held.enter_context(alone_in(folder, "launch", "--exp_name"))
                probe = folder / ".probe"
                probe.write_bytes(b"\0" * 4096)
                probe.unlink()
            except OSError as error:
                raise UserError(f"--output_root_dir: cannot write in {folder}: {error.strerror}") from None
        yield


def set_aside(runs: Iterable[RunConfig]) -> None:
    """Move the records of failed and damaged runs out of the way: a run with a result.json is over."""
    for run in runs:
        path = run.run_folder / "result.json"
        if path.exists():
            path.replace(path.with_suffix(".json.old"))
