"""The command line: flags and a YAML file become a checked `RunConfig`; `python -m eval.config.parser` prints them.

Torch is never imported here, and transformers only for its argument parser (about a second).
"""

from __future__ import annotations

import difflib
import logging
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from eval.commands import command
from eval.config.effects import reads_texts, without_idle
from eval.config.help import asked_for
from eval.config.quant_yaml import quant_flags
from eval.config.run_config import GRID_FLAGS, GROUPS, LAUNCH_FILE, RUN_FILE, RunConfig, name_of
from eval.config.validation import check_inside, validate
from eval.run.full_disk import is_full_disk
from quant.errors import UserError

__all__ = ["RunConfig", "complete", "entry", "parse", "read_flags", "to_yaml", "validate"]

_LAUNCHER_ONLY = (
    *(*GRID_FLAGS, "asha", "hpo", "ray_address"),
    *("num_cpus", "num_gpus", "cpus_per_trial", "gpus_per_trial"),
)
_LISTS = {
    *GRID_FLAGS,
    *("search_space", "target_bits", "include", "exclude", "high_precision_ops", "cuda_visible_devices"),
}
_UNSET = object()
INTERRUPTED = 130
"""exit code after Ctrl-C, as shells know it"""


def parse(argv: Sequence[str]) -> RunConfig:
    """The one run that `argv` asks for, complete and checked.

    Raises UserError, one line that names the flag, the value and the choices, for anything wrong.
    """
    config = read_flags(argv)
    if config.resume is not None:
        config = _used(_resumed(Path(config.resume).expanduser().resolve(), argv))
    for name in _LAUNCHER_ONLY:
        if getattr(config, name) not in (None, False):
            raise UserError(f"--{name} is for the launcher: {command('mpq-search')} ... --{name}")
    return complete(config)


def parse_written(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run whose flags it has written to `path`, with `overrides` of flags on top, complete and checked.

    What had no effect then has none now: it is left out, not refused, whatever an earlier version accepted.
    """
    return complete(_used(read_flags(["--config", str(path), *overrides])))


def _used(config: RunConfig) -> RunConfig:
    return without_idle(replace(config, method=config.own_method))


def _resumed(folder: Path, argv: Sequence[str]) -> RunConfig:
    """The run of `folder`."""
    if not (folder / RUN_FILE).is_file():
        launch = f"; {command('mpq-search', '--resume')} finishes a launch" if (folder / LAUNCH_FILE).is_file() else ""
        raise UserError(f"--resume {folder}: no {RUN_FILE} there; name the folder of a run{launch}")
    # <output_root_dir>/<task>/<exp_name>/<run_id> is where it is now.
    place = {"output_root_dir": str(folder.parents[2]), "exp_name": folder.parent.name, "run_id": folder.name}
    return resumed(folder / RUN_FILE, argv, place)


def complete(config: RunConfig) -> RunConfig:
    """`config` with what follows from the rest filled in (method, default target), and checked."""
    config = replace(config, method=config.own_method)
    if config.method == "search":
        config = replace(config, search=True)
    validate(config)
    if config.target_bits is not None:
        config = replace(config, target_bits=",".join(f"{bits:.12g}" for bits in config.target_list))
    if config.chooses and config.cost_target is None and config.target_bits is None and config.max_drop is None:
        config = replace(config, **_default_target(config))
    check_inside(config)
    return config


def _default_target(config: RunConfig) -> dict[str, Any]:
    """The one limit that is given is the target; else the limits alone count, or the middle of the search space.

    Compute is not --cost_type's default: given beside a limit on memory alone, it is what the policy pays for.
    """
    limits = {"memory": config.max_memory, "compute": config.max_compute}
    given = {kind: value for kind, value in limits.items() if value is not None}
    if given and (config.cost_type in given or config.cost_type == "memory"):
        kind = config.cost_type if config.cost_type in given else next(iter(given))
        return {"cost_type": kind, "cost_target": given[kind]}
    bits = [f.bits for f in config.search_formats]
    limited = bool(given) or config.max_latency is not None
    return {"target_bits": f"{max(bits) if limited else (min(bits) + max(bits)) / 2:g}"}


def resumed(path: Path, argv: Sequence[str], place: Mapping[str, str]) -> RunConfig:
    """The run or launch whose flags a file holds, at `place`: its folder may have been moved, or be mounted elsewhere.

    What `argv` gives wins. Raises UserError for a flag that would make it another run or launch.
    """
    given = flags_given(argv)
    for name in ("config", "output_root_dir", "exp_name"):
        if name in given:
            raise UserError(f"--{name} {given[name]} contradicts --resume {given['resume']}: it goes on where it was")
    values = {**read_yaml(path, "--resume"), **given, **place}
    return replace(read_values(values, "--resume"), resume=None)


def read_flags(argv: Sequence[str]) -> RunConfig:
    """Flags over file over defaults; names and types are right, values are not checked yet.

    Raises UserError for an unknown flag or key (with the closest one) and for a value of the wrong type.
    """
    given = flags_given(argv)
    values = read_yaml(Path(given["config"]), "--config") if given.get("config") else {}
    return read_values({**values, **given}, "flags")


def read_values(values: dict[str, Any], source: str) -> RunConfig:
    """A config from plain values (a YAML file's), typed by OmegaConf. Raises UserError naming `source` and the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(config, False)  # it inherits the frozen dataclass
    for name, value in values.items():
        try:
            # A dollar means itself: what a file's interpolations stand for is there already.
            OmegaConf.update(config, name, value.replace("${", "\\${") if isinstance(value, str) else value)
            if OmegaConf.is_missing(config, name):
                raise UserError(f"{source}: {name}: {value} is no value")
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {name}: {str(error).splitlines()[0]}") from None
    made = OmegaConf.to_object(config)
    assert isinstance(made, RunConfig)
    return made


def to_yaml(config: RunConfig) -> str:
    """`config` as a file that `--config` reads back to the same run: every value but those that are None."""
    import yaml

    values = {f.name: getattr(config, f.name) for f in fields(RunConfig) if f.name != "config"}
    values = {k: v.replace("${", "\\${") if isinstance(v, str) else v for k, v in values.items()}  # no interpolation
    return yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False, allow_unicode=True)


def entry(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main` and exit: wrong input is one line on stderr and exit code 2, a full disk one and 1."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's enums, at every import: not our matter
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
    """The argument parser: one group of flags for each dataclass, a --no_ form for every switch."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            # argparse lists every spelling: 'argument --cost_type/--cost-type: invalid choice: ...'
            spellings, colon, rest = message.removeprefix("argument ").partition(": ")
            raise UserError(f"{spellings.split('/')[0]}{colon}{rest}")

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
    """What `argv` sets, without the defaults: a flag given at its default still wins over the file."""
    if (text := asked_for(argv)) is not None:
        print(text)
        sys.exit(0)
    parser = make_parser()
    unset = Namespace(**{f.name: _UNSET for f in fields(RunConfig)})
    namespace, unknown = parser.parse_known_args(list(argv), unset)
    if unknown:
        name = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = name.split("=")[0]
        close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help_all lists all flags"
        raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name}; {hint}")
    _check_names_of_one(argv)
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET}


def _check_names_of_one(argv: Sequence[str]) -> None:
    """UserError where a flag is given under two of its names. Under one name, the last value counts."""
    given = {word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in argv if word.startswith("--")}
    for entry in fields(RunConfig):
        used = [name for name in (name_of(entry), *entry.metadata.get("aliases", ())) if name in given]
        if len(used) > 1:
            raise UserError(f"{used[0]} and {used[1]} are two names of one flag: give one of them")


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """The keys of a YAML file as fields of the run: aliases resolved, lists joined by commas, types right.

    Raises UserError that names `flag`, the file and the key.
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
            values["remove_padding"] = False  # the section's default is for texts
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
    read_values(values, f"{flag} {path}")  # a wrong type is the file's, not a flag's
    return values


def markdown_table() -> str:
    """All flags as Markdown tables, one for each group: the content of docs/flags.md."""
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
