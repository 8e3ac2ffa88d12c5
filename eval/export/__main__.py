"""Exports a finished run for deployment: `python -m eval.export RUN_DIR --format packed`.

load the run -> write the model -> check the cost of the written model -> load it again and evaluate it -> verdict
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that need the packages
    from eval.commands import require_packages

    require_packages()

import contextlib
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval.config.files import writing
from eval.config.parser import CommandParser, entry
from eval.config.validation import check_one_of
from eval.export.engine_reach import engine_reach
from eval.export.evaluation import evaluate_exported, metric_drop
from eval.export.finished_run import FinishedRun, finished_run
from eval.export.formats import ALLOW_FAKE, EXPORT_FORMATS, ROUND_EMBEDDINGS, ROUND_OUTPUTS, Written
from eval.modeling.inputs import to_json
from quant.engines.table import ENGINES
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from cost.units import CostType

EXPORT_VERSION = 1
"""The schema_version of export.json, which is independent of the version of run records."""
AUTO = "auto"
"""--format that writes a file for every engine that runs the result."""
MIB = 2**20
MAX_METRIC_DROP = 0.01
"""Largest degradation of a metric in the exported file that is attributed to rounding."""


def export(run: FinishedRun, format: str, folder: Path, evaluate: bool = True) -> dict[str, Any]:
    """Export a run. The folder is created atomically.

    Args:
        run: Run to export.
        format: Key of EXPORT_FORMATS.
        folder: Folder to create.
        evaluate: Load the exported model again and evaluate it.

    Returns:
        The verdict, which is also the content of export.json.

    Raises:
        UserError: The folder exists, the format cannot hold the model, or its cost is over the target of the run.
    """
    from eval.export.model_card import model_card
    from trainer.training.checkpoint import write_atomically, write_json

    EXPORT_FORMATS[format].check_installed()
    with contextlib.ExitStack() as stack:
        for missing in reversed([parent for parent in folder.parents if not parent.exists()]):
            stack.callback(_remove_empty, missing)
        with writing("output_dir", folder):
            if folder.exists():
                raise UserError(f"--output_dir {folder}: exists already; choose another or remove it")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(TemporaryDirectory(prefix=".export.", dir=folder.parent))
            place = Path(temporary) / folder.name
            place.mkdir()
        run.check()
        if evaluate:
            _ = run.plan  # loads the data first, so that missing data is reported before the export
        with writing("output_dir", folder):
            written = EXPORT_FORMATS[format].write(run, place)
        verdict = describe(run, format, written, evaluate)
        verdict["metrics"] = {
            "record": run.record["metrics"],
            "exported": evaluate_exported(run, EXPORT_FORMATS[format].load(run, place)) if evaluate else None,
        }
        verdict["notes"] += metric_drop_warnings(run.record, verdict["metrics"]["exported"] or {})
        usage = written.usage or EXPORT_FORMATS[format].usage
        assert usage is not None
        card = model_card(run, verdict, usage)
        with writing("output_dir", folder):
            write_json(place / "export.json", verdict)
            write_atomically(place / "README.md", lambda path: Path(path).write_text(card))
            place.rename(folder)
    return verdict


def _remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def export_for(run: FinishedRun, engine: str, folder: Path, evaluate: bool = True) -> dict[str, Any]:
    """Export a run for an engine, see `export`.

    Raises:
        UserError: The engine does not run the formats of the run; the message names the first layers in its way.
    """
    found = engine_reach(run.model, run.modules)[engine]
    if not found.runs_some:
        raise UserError(
            f"--engine {engine}: does not run what RUN_DIR {run.folder} has chosen: {found.obstacle}; search with "
            f"--engine {engine}, or choose --format packed"
        )
    return export(run, export_format(engine), folder, evaluate)


def export_format(engine: str) -> str:
    """Return the export format that an engine reads. Raises UserError if no exporter writes it."""
    format = ENGINES[engine].export
    if format not in EXPORT_FORMATS:
        raise UserError(f"--engine {engine}: it reads {format}, which is not written here; choose --format packed")
    return format


def export_all(run: FinishedRun, root: Path, evaluate: bool = True) -> list[dict[str, Any]]:
    """Export a run in every format that an engine runs it from.

    Args:
        run: Run to export.
        root: Folder that gets a folder for each format.
        evaluate: Load the exported models again and evaluate them.

    Returns:
        One row per engine: engine, format, and either folder and verdict, or why there is no file for it.

    Raises:
        UserError: No engine runs the result, or a folder exists already.
    """
    run.check()
    if evaluate:
        _ = run.plan  # missing data is not an obstacle of one engine
    reach = engine_reach(run.model, run.modules)
    formats = dict.fromkeys(ENGINES[name].export for name, found in reach.items() if found.runs_some)
    wanted = [format for format in formats if format in EXPORT_FORMATS]
    if standing := [root / format for format in wanted if (root / format).exists()]:
        raise UserError(f"--format auto: {standing[0]} exists already; choose another --output_dir or remove it")
    written: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for format in wanted:
        try:
            written[format] = export(run, format, root / format, evaluate)
        except UserError as error:
            if str(error).startswith("RUN_DIR"):  # the run is damaged, whatever it is written as
                raise
            failed[format] = str(error).removeprefix(f"--format {format}: ")
    rows = []
    for name, found in reach.items():
        format = ENGINES[name].export
        row: dict[str, Any] = {"engine": name, "format": format, "verdict": None, "folder": root / format, "why": None}
        if not found.runs_some:
            row["why"] = found.obstacle
        elif format in written:
            row["verdict"] = written[format]
        else:
            row["why"] = failed.get(format, f"{format} is not written here")
        rows.append(row)
    if not written:
        reasons = dict.fromkeys(str(row["why"]).split(";")[0] for row in rows)
        names = {why: ", ".join(row["engine"] for row in rows if str(row["why"]).startswith(why)) for why in reasons}
        told = "; ".join(f"{engines}: {why}" for why, engines in names.items())
        raise UserError(f"--format auto: no engine runs RUN_DIR {run.folder}: {told}; choose --format packed")
    return rows


def describe(run: FinishedRun, format: str, written: Written, evaluated: bool) -> dict[str, Any]:
    """Return the verdict without metrics.

    Args:
        run: The exported run.
        format: Key of EXPORT_FORMATS.
        written: Result of writing the model.
        evaluated: Whether the data of the run is loaded, see `FinishedRun.profiles`.

    Raises:
        UserError: The cost of the exported model is over the target, or the saved model contradicts its record.
    """
    from torch import nn

    from cost.cost import charged_bits, cost_of_bits, memory_cost
    from quant.formats import FLOAT, parse_format

    record = run.record
    profiles = run.profiles(evaluated)
    profile_of = {profile.name: profile for profile in profiles}
    chosen = {
        name: (charged_bits(profile_of[name], layer.weight), layer.activation.bits)
        for name, layer in written.layers.items()
    }
    exported = {name: (layer.weight_bits, layer.activation_bits) for name, layer in written.layers.items()}
    # Most exports have no types for embeddings: their rounded values stay in float, which the verdict says.
    tables = {name for name, module in run.modules.items() if isinstance(module, nn.Embedding)}
    held = exported | {name: bits for name, bits in chosen.items() if name in tables}
    cached = {p.name: record["assignment"][p.name] for p in profiles if p.kind == "kv_cache"}  # no file holds them
    of_caches = {name: (parse_format(stored).bits, FLOAT.bits) for name, (stored, _) in cached.items()}
    chosen, exported, held = chosen | of_caches, exported | of_caches, held | of_caches
    beside = 0.0  # what a file holds besides the layers' weights, under --cost_scope file
    if record["cost_type"] == "memory":
        pairs = {name: (layer.weight, layer.activation) for name, layer in written.layers.items()}
        whole = {profile.name: pairs.get(profile.name, (FLOAT, FLOAT)) for profile in profiles}
        beside = memory_cost(profiles, whole) - memory_cost([replace(p, file=None) for p in profiles], whole)

    def cost(bits: Mapping[str, tuple[float, float]], cost_type: CostType) -> float:
        return cost_of_bits(profiles, [bits.get(profile.name, (16, 16)) for profile in profiles], cost_type)

    kind = record["cost_type"]
    costs = {"chosen": beside + cost(chosen, kind), "exported": beside + cost(exported, kind)}
    memory = cost({**exported, **dict.fromkeys(cached, (0.0, 0.0))}, "memory") * MIB
    if not math.isclose(costs["chosen"], record["cost"], rel_tol=1e-9):
        raise UserError(
            f"RUN_DIR {run.folder}: its saved model costs {costs['chosen']:.6g} {record['cost_unit']}, "
            f"its record says {record['cost']:.6g}"
        )
    target = record["cost_target"]
    # Both costs are exact sums; the tolerance covers the rounding of the target to float64.
    if target is not None and beside + cost(held, kind) > target * (1 + 1e-12):
        widened = [name for name, layer in written.layers.items() if not layer.as_chosen]
        if len(widened) > 3:
            widened = [*widened[:3], "..."]
        engines = [engine.name for engine in ENGINES.values() if engine.export == format]
        others = f", and a search with --engine {engines[0]} takes what {format} stores" if engines else ""
        raise UserError(
            f"--format {format}: the exported model costs {costs['exported']:.6g} {record['cost_unit']}, over the "
            f"target of {target:.6g}, since {format} stores {', '.join(widened)} wider than chosen; "
            f"--format packed stores every format as it is{others}"
        )
    floats = [p.params for p in profiles if exported.get(p.name, (16, 16))[0] == 16]
    file_bytes = sum(written.sizes.values())
    return {
        "schema_version": EXPORT_VERSION,
        "format": format,
        "task": record["task"],
        "model": record["model"],
        "run_id": record["run_id"],
        "inputs": to_json(run.inputs),
        "layers": {
            name: {
                "chosen": [layer.weight.name, layer.activation.name],
                "exported": [layer.exported_weight, layer.exported_activation],
                "bits": [layer.weight_bits, layer.activation_bits],
                "as_chosen": layer.as_chosen,
                "why": list(layer.why),
                **({"engine": layer.engine} if layer.engine else {}),
            }
            for name, layer in written.layers.items()
        },
        "embeddings": {
            name: {"exported": table.exported_weight, "bits": table.weight_bits}
            for name, table in written.embeddings.items()
        },
        "cost": {"type": record["cost_type"], "unit": record["cost_unit"], "target": target, **costs},
        "size": {
            "float32_bytes": float_bytes(run.model),
            "file_bytes": file_bytes,
            "ratio": round(file_bytes / float_bytes(run.model), 4),
            "parts": written.sizes,
            "weights_by_cost": round(memory),
            "weights_in_file": written.weight_bytes,
            # Padding of codes to whole bytes and whole blocks; float weights are stored in 32 bits but charged at 16.
            "weights_beyond_cost": written.weight_bytes - round(memory),
            "of_these_float32": 0 if record.get("cost_scope") == "file" else sum(floats) * 2,
        },
        "measured": written.facts,
        "notes": list(written.notes),
    }


def float_bytes(model: nn.Module) -> int:
    """Return the size in bytes of a float32 checkpoint of the model, without quantizers; shared tensors count once."""
    tensors = {
        (tensor.data_ptr(), tensor.shape): tensor.numel()
        for name, tensor in model.state_dict().items()
        if "_quantizer." not in name
    }
    return 4 * sum(tensors.values())


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print the verdict as a table with one row per layer, and its totals."""
    from rich.console import Console

    from eval.export.model_card import summary
    from eval.report.tables import Column, Table, print_table

    rows = [{"layer": name, **layer} for name, layer in verdict["layers"].items()]
    columns = [
        Column("layer", lambda row: row["layer"]),
        Column("chosen", lambda row: "/".join(row["chosen"])),
        Column("exported", lambda row: "/".join(row["exported"])),
        Column("bits", lambda row: "/".join(f"{bits:g}" for bits in row["bits"])),
        *([Column("engine", lambda row: row.get("engine", ""))] if any("engine" in row for row in rows) else []),
        Column("verdict", lambda row: "as chosen" if row["as_chosen"] else "; ".join(row["why"])),
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    print_table(Table(f"{verdict['run_id']} as {verdict['format']}", columns, rows), console)
    console.print("\n".join(["", *summary(verdict)]), markup=False)


def print_engines(run: FinishedRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one row per engine: its file, or why there is none."""
    from rich.console import Console

    from eval.report.tables import Column, Table, print_table

    def size(row: Mapping[str, Any]) -> str:
        return "" if row["verdict"] is None else f"{row['verdict']['size']['file_bytes']:,}"

    def quality(row: Mapping[str, Any]) -> str:
        exported = (row["verdict"] or {}).get("metrics", {}).get("exported") or {}
        return "  ".join(f"{metrics[run.record['metric']]:.5g}" for metrics in exported.values())

    columns = [
        Column("engine", lambda row: row["engine"]),
        Column("format", lambda row: row["format"]),
        Column("bytes", size),
        Column(run.record["metric"], quality),
        Column("file", lambda row: f"no: {row['why']}" if row["verdict"] is None else str(row["folder"])),
    ]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    print_table(Table(f"{run.record['run_id']} for each engine", columns, list(rows)), console)


def metric_drop_warnings(record: dict[str, Any], exported: dict[str, dict[str, float]]) -> list[str]:
    """Return a warning for each split whose main metric is worse in the file by more than `MAX_METRIC_DROP`."""
    name, lines = record["metric"], []
    for split, metrics in exported.items():
        before, after = record["metrics"][split][name], metrics[name]
        if not metric_drop(name, before, after) <= MAX_METRIC_DROP:  # also true for NaN
            lines.append(
                f"warning: {split} {name} {before:.5g} -> {after:.5g}: the file does not compute what the run trained; "
                "--format packed does"
            )
    return lines


def _flags(argv: Sequence[str]) -> Namespace:
    parser = CommandParser(
        "mpq-export", "A finished run as a model for deployment.", "output/digits/default/RUN --format onnx"
    )
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="folder of a finished run")
    add(
        "--format",
        help=f"what to write: {', '.join(EXPORT_FORMATS)}; auto: a file for every engine that runs the result",
    )
    add("--engine", help=f"write what this engine reads, if it runs the result: {', '.join(ENGINES)}")
    add("--output_dir", type=Path, help="where to write (default: RUN_DIR/export/FORMAT; auto: RUN_DIR/export)")
    add("--data_dir", help="where the run's data stands now")
    add("--no_evaluate", action="store_true", help="do not read the export back and evaluate it")
    add("--allow_fake", action="store_true", help=ALLOW_FAKE)
    parser.add_switch("round_outputs", ROUND_OUTPUTS)
    parser.add_switch("round_embeddings", ROUND_EMBEDDINGS)
    return parser.parse_args(argv)


def _check_target(flags: Namespace) -> None:
    """Check --format and --engine, and fill in the format of the engine."""
    if flags.engine is not None:
        check_one_of("--engine", flags.engine, ENGINES)
        own = export_format(flags.engine)
        if flags.format not in (None, own):
            raise UserError(f"--format {flags.format} contradicts --engine {flags.engine}: it reads {own}")
        flags.format = own
    if flags.format is None:
        raise UserError(f"--format is missing; choices: {', '.join([*EXPORT_FORMATS, AUTO])}, or --engine NAME")
    check_one_of("--format", flags.format, [*EXPORT_FORMATS, AUTO])


def main(argv: Sequence[str]) -> int:
    """Export a run and print the verdict and the folder. Returns the exit code."""
    flags = _flags(argv)
    _check_target(flags)
    for name in ("round_outputs", "round_embeddings"):
        if (value := getattr(flags, name)) is not None and flags.format != "onnx":
            spelled = f"--{name}" if value else f"--no_{name}"
            raise UserError(f"{spelled} contradicts --format {flags.format}: it is for onnx alone")
    if flags.allow_fake and flags.format != "torchao":
        raise UserError(f"--allow_fake contradicts --format {flags.format}: it is for torchao alone")
    asked = {"round_outputs": flags.round_outputs, "allow_fake": flags.allow_fake}
    asked["round_embeddings"] = flags.round_embeddings is not False
    run = replace(finished_run(flags.run, flags.data_dir), **asked)
    if flags.format == AUTO:
        rows = export_all(run, flags.output_dir or flags.run / "export", evaluate=not flags.no_evaluate)
        print_engines(run, rows)
        return 0
    folder = flags.output_dir or flags.run / "export" / flags.format
    if flags.engine is None:
        verdict = export(run, flags.format, folder, evaluate=not flags.no_evaluate)
    else:
        verdict = export_for(run, flags.engine, folder, evaluate=not flags.no_evaluate)
    print_verdict(verdict)
    print(f"export: {folder}")
    return 0


if __name__ == "__main__":
    entry(main)
