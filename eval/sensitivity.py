"""Measures the sensitivity of each layer without training: `python -m eval.sensitivity FLAGS OF A RUN`.

    python -m eval.sensitivity --task cifar10 --model resnet20 --model_path DIR --search_space 2,4,8 [--kinds trace]

Prints a table, and writes it as CSV and as a picture. Kinds of sensitivity:

    measured           divergence of the class probabilities (or increase of the loss) with one decision quantized,
                       and its standard error
    fisher             squared gradient x squared change of the output
    trace, eigenvalue  of the Hessian of the loss in a layer's weight: the trace with its standard error over random
                       vectors, the largest eigenvalue with its spread over batches
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that need these packages
    from eval.commands import require_packages

    require_packages()

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.parser import entry, parse, read_flags
from eval.run.sensitivities import FILE, Columns, choice_names, write_csv
from quant.errors import UserError

if TYPE_CHECKING:
    from trainer.reinforce_trainer import ReinforceTrainer

KINDS = ("measured", "fisher", "trace", "eigenvalue")


def measure(trainer: ReinforceTrainer, kinds: Sequence[str]) -> Columns:
    """Measure the sensitivities of every decision.

    Args:
        trainer: a trainer with a search, whose layers are calibrated.
        kinds: names of `KINDS`.
    """
    import torch

    from policy.hessian import hessian_traces, top_eigenvalues
    from quant.convert import in_float
    from trainer.search.baselines import sensitivities

    space, modules, evaluator = trainer.space, trainer.modules, trainer.evaluator
    formats = choice_names(space)
    columns: Columns = {}
    if "measured" in kinds:
        measured = evaluator.measure()
        for index, name in enumerate(formats):
            columns[f"measured {name}"] = list(zip(measured.mean[:, index], measured.error[:, index], strict=True))
    if "fisher" in kinds:
        table = sensitivities("fisher", evaluator, trainer.args.seed)
        for index, name in enumerate(formats):
            columns[f"fisher {name}"] = [(float(value), None) for value in table[:, index]]
    layers = {layer: modules[layer] for decision in space.decisions for layer in decision.layers}
    batches = evaluator.evaluation_batches(space.num_decisions * space.num_choices)
    generator = torch.Generator().manual_seed(trainer.args.seed)
    with in_float(modules):
        if "trace" in kinds:
            traces = hessian_traces(trainer.model, layers, batches, evaluator.loss, generator=generator, jointly=True)
            own = [[traces[layer] for layer in decision.layers] for decision in space.decisions]
            columns["trace"] = [(sum(t.trace for t in ts), sum(t.error**2 for t in ts) ** 0.5) for ts in own]
        if "eigenvalue" in kinds:
            tops = top_eigenvalues(
                trainer.model, layers, batches, evaluator.loss, max_iterations=20, generator=generator
            )
            columns["eigenvalue"] = [
                max(((tops[layer].mean, tops[layer].spread) for layer in d.layers), key=lambda pair: abs(pair[0]))
                for d in space.decisions
            ]
    return columns


def show(names: Sequence[str], columns: Columns) -> Any:
    """Return a table for a terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("decision", overflow="fold")
    for title in columns:
        table.add_column(title, justify="right")
    for row, name in enumerate(names):
        cells = (values[row] for values in columns.values())
        table.add_row(name, *(f"{v:.3g}" if e is None else f"{v:.3g} ± {e:.1g}" for v, e in cells))
    return table


def draw(names: Sequence[str], columns: Columns, path: Path) -> None:
    """Draw one panel per kind with one row per decision and error bars, on a logarithmic axis, as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from eval.report.canvas import COLOURS, MARKERS, STYLE, plain_log_ticks

    kinds = [kind for kind in KINDS if any(title.split()[0] == kind for title in columns)]
    with rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 2.6 * len(kinds), 1.2 + 0.19 * len(names)), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            own = {title: values for title, values in columns.items() if title.split()[0] == kind}
            for number, (title, values) in enumerate(own.items()):
                sizes = [abs(value) for value, _ in values]
                errors = None if values[0][1] is None else [error or 0.0 for _, error in values]
                panel.errorbar(
                    sizes,
                    range(len(names)),
                    xerr=errors,
                    fmt=MARKERS[number % len(MARKERS)],
                    color=COLOURS[number % len(COLOURS)],
                    ms=3.5,
                    lw=0.8,
                    label=title.removeprefix(kind).strip() or None,
                )
            panel.set_xscale("log")
            plain_log_ticks(panel.xaxis)
            panel.set_title(kind)
            panel.set_xlabel({"measured": "divergence or loss [nats]", "fisher": "score"}.get(kind, f"|{kind}|"))
            if len(own) > 1:
                panel.legend(loc="best")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        figure.savefig(path)


def main(argv: list[str]) -> int:
    """Measure, print the table, and write sensitivity.csv and sensitivity.png into the run's folder."""
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\n--kinds {','.join(KINDS)}; the other flags are a run's: --help_all lists them")
        return 0
    kinds: Sequence[str] = ("measured", "fisher", "trace")
    if "--kinds" in argv:
        at = argv.index("--kinds")
        kinds = (argv[at + 1] if len(argv) > at + 1 else "").split(",")
        argv = argv[:at] + argv[at + 2 :]
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(f"--kinds {','.join(kinds)}: unknown {kind!r}; choices: {', '.join(KINDS)}")
    asked = read_flags(argv)
    search = [] if asked.searches or asked.method is not None else ["--search"]
    config = parse([*argv, "--report_to", "none", *search])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from rich.console import Console

    from eval.run.plan import make_plan
    from eval.run.trainer import make_trainer
    from quant.convert import calibrate

    trainer, modules, _ = make_trainer(make_plan(config))
    calibrate(trainer.model, modules, trainer.calibration.batches())
    names = [decision.name for decision in trainer.space.decisions]
    columns = measure(trainer, kinds)
    Console().print(show(names, columns))
    config.run_folder.mkdir(parents=True, exist_ok=True)
    for name, write in ((FILE, write_csv), ("sensitivity.png", draw)):
        write(names, columns, config.run_folder / name)
        print(config.run_folder / name)
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    entry(main)
