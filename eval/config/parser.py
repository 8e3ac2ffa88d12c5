"""Parses flags and a YAML file into a checked `RunConfig`.

`python -m eval.config.parser` prints all flags as Markdown (docs/flags.md). Torch is never imported here, and
transformers only for its argument parser (about a second).
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from eval.commands import command
from eval.config.effects import reads_texts, without_idle
from eval.config.engine import for_engine
from eval.config.help import requested_help
from eval.config.quant_yaml import quant_flags
from eval.config.run_config import GRID_FLAGS, GROUPS, LAUNCH_FILE, RUN_FILE, RunConfig, name_of
from eval.config.suggestions import did_you_mean
from eval.config.validation import check_inside, validate
from eval.run.full_disk import is_full_disk
from quant.engines.table import ENGINES
from quant.errors import UserError

__all__ = ["RunConfig", "complete", "entry", "parse", "read_flags", "to_yaml", "validate"]

_LAUNCHER_ONLY = (
    *(*GRID_FLAGS, "asha", "hpo", "ray_address"),
    *("num_cpus", "num_gpus", "cpus_per_trial", "gpus_per_trial"),
)
_LISTS = {
    *GRID_FLAGS,
    *("search_space", "target_bits", "include", "exclude", "high_precision_ops", "cuda_visible_devices"),
    "quantize_kv_cache",
}
_UNSET = object()
INTERRUPTED = 130
"""exit code after Ctrl-C: 128 + SIGINT, the convention of shells"""


def parse(argv: Sequence[str]) -> RunConfig:
    """Parse the flags of one run into a complete, checked config.

    Raises:
        UserError: one line that names the flag, the value and the choices.
    """
    config = read_flags(argv)
    if config.resume is not None:
        config = _used(_resumed(Path(config.resume).expanduser().resolve(), argv))
    for name in _LAUNCHER_ONLY:
        if getattr(config, name) not in (None, False):
            raise UserError(f"--{name} is for the launcher: {command('mpq-search')} ... --{name}")
    return complete(config)


def parse_written(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the flags that a run saved, apply `overrides`, and return the complete, checked config.

    Saved flags without effect are dropped instead of refused: an earlier version may have accepted them.

    Args:
        path: the config.yaml of a run.
        overrides: flags that win over the file.
    """
    return complete(_used(read_flags(["--config", str(path), *overrides])))


def _used(config: RunConfig) -> RunConfig:
    return without_idle(replace(config, method=config.own_method))


def _resumed(folder: Path, argv: Sequence[str]) -> RunConfig:
    """Read the config of the run in `folder`; flags in `argv` win."""
    if not (folder / RUN_FILE).is_file():
        launch = f"; {command('mpq-search', '--resume')} finishes a launch" if (folder / LAUNCH_FILE).is_file() else ""
        raise UserError(f"--resume {folder}: no {RUN_FILE} there; name the folder of a run{launch}")
    # The folder may have been moved since: take its place from its path, <output_root_dir>/<task>/<exp_name>/<run_id>.
    place = {"output_root_dir": str(folder.parents[2]), "exp_name": folder.parent.name, "run_id": folder.name}
    return resumed(folder / RUN_FILE, argv, place)


def complete(config: RunConfig) -> RunConfig:
    """Fill in what follows from the other flags (method, default target), and check the result.

    Raises:
        UserError: for the first invalid or contradictory value.
    """
    config = replace(config, method=config.own_method)
    if config.method == "search":
        config = replace(config, search=True)
    validate(config)
    config = for_engine(config)
    if config.target_bits is not None:
        config = replace(config, target_bits=",".join(f"{bits:.12g}" for bits in config.target_list))
    if config.chooses and config.cost_target is None and config.target_bits is None and config.max_drop is None:
        config = replace(config, **_default_target(config))
    check_inside(config)
    return config


def _default_target(config: RunConfig) -> dict[str, Any]:
    """Choose the target of a search that names none.

    A limit (--max_memory, --max_compute) in the unit of --cost_type becomes the target; so does the only limit if
    --cost_type is left at its default, memory. Otherwise, with limits, the target is the widest format, so that only
    the limits bind; without limits, it is the middle of the search space.
    """
    limits = {"memory": config.max_memory, "compute": config.max_compute}
    given = {kind: value for kind, value in limits.items() if value is not None}
    if given and (config.cost_type in given or config.cost_type == "memory"):
        kind = config.cost_type if config.cost_type in given else next(iter(given))
        return {"cost_type": kind, "cost_target": given[kind]}
    bits = config.charged_bits
    limited = bool(given) or config.max_latency is not None
    return {"target_bits": f"{max(bits) if limited else (min(bits) + max(bits)) / 2:g}"}


def resumed(path: Path, argv: Sequence[str], place: Mapping[str, str]) -> RunConfig:
    """Read the saved flags of a run or launch to resume it.

    Args:
        path: the file that holds the flags.
        argv: the command line; its flags win over the file.
        place: the values that follow from the folder's current path, which may differ from the saved one.

    Raises:
        UserError: for a flag that would turn it into another run or launch.
    """
    given = flags_given(argv)
    for name in ("config", "output_root_dir", "exp_name"):
        if name in given:
            raise UserError(f"--{name} {given[name]} contradicts --resume {given['resume']}: it goes on where it was")
    values = {**read_yaml(path, "--resume"), **given, **place}
    return replace(read_values(values, "--resume"), resume=None)


def read_flags(argv: Sequence[str]) -> RunConfig:
    """Merge flags over the --config file over the defaults. Checks names and types, but not values.

    Raises:
        UserError: for an unknown flag or key (with the closest one), or a value of the wrong type.
    """
    given = flags_given(argv)
    values = read_yaml(Path(given["config"]), "--config") if given.get("config") else {}
    return read_values(_with_default_space({**values, **given}), "flags")


def _with_default_space(values: dict[str, Any]) -> dict[str, Any]:
    """Add the search space of --engine where no formats are given."""
    engine = ENGINES.get(str(values.get("engine")))
    given = {"bits", "weight_bits", "activation_bits"} & values.keys()
    return values if engine is None or given else {"search_space": engine.default_space, **values}


def read_values(values: dict[str, Any], source: str) -> RunConfig:
    """Convert plain values, such as those of a YAML file, to a config; OmegaConf checks their types.

    Raises:
        UserError: names `source` and the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(config, False)  # it inherits the frozen dataclass
    for name, value in values.items():
        try:
            # Interpolations of the file are resolved already, so a remaining "${" is literal.
            OmegaConf.update(config, name, value.replace("${", "\\${") if isinstance(value, str) else value)
            if OmegaConf.is_missing(config, name):
                raise UserError(f"{source}: {name}: {value} is no value")
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {name}: {str(error).splitlines()[0]}") from None
    made = OmegaConf.to_object(config)
    assert isinstance(made, RunConfig)
    return made


def to_yaml(config: RunConfig) -> str:
    """Write a config, except values that are None, as YAML that `--config` reads back to the same run."""
    import yaml

    values = {f.name: getattr(config, f.name) for f in fields(RunConfig) if f.name != "config"}
    values = {k: v.replace("${", "\\${") if isinstance(v, str) else v for k, v in values.items()}  # no interpolation
    return yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False, allow_unicode=True)


class CommandParser(ArgumentParser):
    """Argument parser of a command that raises UserError instead of printing its usage and exiting.

    Args:
        name: console command, such as 'mpq-export'.
        description: what the command does, for --help.
        example: arguments of the example that --help ends with.
    """

    def __init__(self, name: str, description: str, example: str) -> None:
        epilog = f"for example: {command(name)} {example}"
        super().__init__(prog=command(name), description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the message of argparse."""
        raise UserError(with_suggestion(message))

    def add_switch(self, name: str, help: str) -> None:
        """Add a flag and its --no_ form; None if neither is given."""
        self.add_argument(f"--{name}", action="store_true", default=None, help=help)
        spellings = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
        self.add_argument(*spellings, dest=name, action="store_false", default=None, help=SUPPRESS)


def with_suggestion(message: str) -> str:
    """Return an error of argparse, with the closest choice if the value is none of a flag's choices."""
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
    return message if found is None else message + did_you_mean(found[1], found[2].replace("'", "").split(", "))


def entry(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main` and exit with its code; known errors are one line on stderr instead of a traceback.

    Exit codes: 2 for wrong input (UserError), 1 for a full disk, 130 after Ctrl-C.
    """
    # torchao registers enums at import, which logs deprecation warnings that users cannot act on.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_full_disk(error):
            raise
        print("failed: the disk is full; make room, and give the same command again", file=sys.stderr)
        sys.exit(1)


def make_parser() -> Any:
    """Build the argument parser: one group of flags per dataclass, and a --no_ form for every switch."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            # argparse lists every spelling: 'argument --cost_type/--cost-type: invalid choice: ...'
            spellings, colon, rest = message.removeprefix("argument ").partition(": ")
            raise UserError(f"{spellings.split('/')[0]}{colon}{with_suggestion(rest)}")

    groups: Any = GROUPS
    parser = Parser(groups, allow_abbrev=False)
    for name in _switches():
        if f"--no_{name}" not in parser._option_string_actions:
            spellings = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            parser.add_argument(*spellings, action="store_false", dest=name, help=SUPPRESS)
    return parser


def _switches() -> list[str]:
    return [f.name for f in fields(RunConfig) if str(f.type).startswith(("bool", "<class 'bool'>"))]


def flags_given(argv: Sequence[str]) -> dict[str, Any]:
    """Return only the flags that `argv` sets, so that one given at its default still wins over the file.

    Prints the help and exits if `argv` asks for it.
    """
    if (text := requested_help(argv)) is not None:
        print(text)
        sys.exit(0)
    parser = make_parser()
    unset = Namespace(**{f.name: _UNSET for f in fields(RunConfig)})
    namespace, unknown = parser.parse_known_args(list(argv), unset)
    if unknown:
        name = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = name.split("=")[0]
        flags = [flag.removeprefix("--") for flag in parser._option_string_actions]
        close = difflib.get_close_matches(name.removeprefix("--"), flags, n=1) if name.startswith("--") else []
        hint = f"did you mean --{close[0]}?" if close else "--help_all lists all flags"
        raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name}; {hint}")
    _check_aliases(argv)
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET}


def _check_aliases(argv: Sequence[str]) -> None:
    """Raise UserError if a flag is given under two of its names. Repeated under one name, its last value counts."""
    given = {word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in argv if word.startswith("--")}
    for entry in fields(RunConfig):
        used = [name for name in (name_of(entry), *entry.metadata.get("aliases", ())) if name in given]
        if len(used) > 1:
            raise UserError(f"{used[0]} and {used[1]} are two names of one flag: give one of them")


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """Read a YAML file as fields of `RunConfig`: aliases resolved, lists joined by commas, types checked.

    Raises:
        UserError: names `flag`, the file and the key.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{flag} {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{flag} {path}: must hold 'name: value' lines")
    names = {f.name: f for f in fields(RunConfig)}
    names |= {alias.lstrip("-"): f for f in fields(RunConfig) for alias in f.metadata.get("aliases", ())}
    values: dict[str, Any] = {}
    if "quant" in loaded:
        section = loaded.pop("quant")
        values = quant_flags(section, f"{flag} {path}")
        if "is_remove_padding" not in section and not reads_texts(loaded.get("task")):
            values["remove_padding"] = False  # the section's default, True, is meant for texts
        if twice := values.keys() & loaded.keys():
            raise UserError(f"{flag} {path}: {min(twice)!r} is said by the quant section too; say it once")
    for key, value in loaded.items():
        if key not in names or key == "config":
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]}?" if close else "the keys are the flags' names"
            raise UserError(f"{flag} {path}: unknown key {key!r}; {hint}")
        field = names[key]
        if field.name in values:
            raise UserError(f"{flag} {path}: {key!r} says again what {field.name!r} says; say it once")
        if isinstance(value, list) and field.name in _LISTS:
            value = ",".join(str(item) for item in value)
        elif isinstance(value, bool) and "const" in field.metadata:  # 'block_search: true' is the flag without a value
            value = field.metadata["const"] if value else False if field.metadata["const"] is True else None
        values[field.name] = value
    read_values(values, f"{flag} {path}")  # here, so that the error names the file
    return values


def markdown_table() -> str:
    """Return all flags as Markdown tables, one per group: the content of docs/flags.md."""
    lines = []
    for group in GROUPS:
        lines += [f"## {group._argument_group_name}", "", "| flag | default | meaning |", "|---|---|---|"]
        for f in fields(group):
            names = ", ".join(f"`{name}`" for name in (name_of(f), *f.metadata.get("aliases", ())))
            names += f" / `--no_{f.name}`" if f.default is True else ""
            default = ("off", "on")[f.default] if isinstance(f.default, bool) else f.default
            default = "" if default is None else f"`{default}`"
            meaning = f.metadata["help"]
            if "choices" in f.metadata:
                meaning += ": " + ", ".join(f"`{choice}`" for choice in f.metadata["choices"])
            lines.append(f"| {names} | {default} | {meaning.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(markdown_table())
