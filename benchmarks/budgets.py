"""Several budgets from one run against a run for each; for benchmarks/RESULTS.md.

    python -m benchmarks.budgets --shared ../shared [--row digits] [--bits 3,3.5,4,5] [--own 3,5] [--longer 1.4]
        [--seeds 0,1,2]

Model, data, float weights and steps are those of a row of benchmarks.quality. A run that has its record is not run
again.
"""

from __future__ import annotations

import argparse
import json
import shlex
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality import ROOT, common_flags, rows, run, score


def shared(flags: list[str], bits: list[str], seed: str, longer: float) -> list[dict[str, Any]]:
    """Return the record of each budget from one run, which may train longer than a run for one of them."""
    steps = round(int(flags[flags.index("--max_steps") + 1]) * longer)
    name = f"all-budgets-s{seed}" if longer == 1 else f"all-budgets-x{longer:g}-s{seed}"
    given = [*flags, "--max_steps", str(steps), "--target_bits", ",".join(bits), "--seed", seed]
    last, folder = run(given, name)
    return [*(json.loads((folder / f"{b}b" / "result.json").read_text()) for b in bits[:-1]), last]


def line(seed: str, of_all: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> str:
    """Return a seed's line of the table."""
    cells = [f"{score(one):.2f}" + (f" / {score(own[b]):.2f}" if b in own else "") for b, one in of_all.items()]
    seconds = [max(record["wall_seconds"] for record in of_all.values())]
    seconds.append(mean(record["wall_seconds"] for record in own.values()))
    return f"| {seed} | {' | '.join(cells)} | {seconds[0] / seconds[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--row", default="digits", choices=rows(), metavar="ROW")
    parser.add_argument("--bits", default="3,3.5,4,5", help="comma list of budgets, ascending")
    parser.add_argument("--own", help="comma list of the budgets with a run of their own; default: all")
    parser.add_argument("--longer", type=float, default=1.0, help="steps of the run for all over those of an own run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    bits = arguments.bits.split(",")
    alone = bits if arguments.own is None else arguments.own.split(",")
    if unknown := set(alone) - set(bits):
        parser.error(f"--own {min(unknown)}: is none of --bits {arguments.bits}")
    row, places = rows()[arguments.row], (arguments.shared.resolve(), arguments.output_root_dir.resolve())
    flags = [*common_flags(arguments.row, row, *places), *shlex.split(row.budget), "--search", "--quiet"]
    heads = " | ".join(f"{b} bits: of all" + " / own run" * (b in alone) + " [%]" for b in bits)
    print(f"{arguments.row}\n\n| seed | {heads} | time of one for all / of an own one |")
    print("|---" * (len(bits) + 2) + "|")
    apart: dict[str, list[float]] = {b: [] for b in alone}
    for seed in arguments.seeds.split(","):
        of_all = dict(zip(bits, shared(flags, bits, seed, arguments.longer), strict=True))
        own = {b: run([*flags, "--target_bits", b, "--seed", seed], f"only-{b}b-s{seed}")[0] for b in alone}
        for b in alone:
            apart[b].append(score(of_all[b]) - score(own[b]))
        print(line(seed, of_all, own), flush=True)
    means = (f"{mean(apart[b]):+.2f}" if b in alone else "" for b in bits)
    print(f"| mean difference [points] | {' | '.join(means)} | |\n\n{date.today()}")


if __name__ == "__main__":
    main()
