"""Several budgets from one run against a run for each; for benchmarks/RESULTS.md.

    python -m benchmarks.budgets --shared ../shared [--row digits] [--bits 3,3.5,4,5] [--own 3,5] [--seeds 0,1,2]

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

from benchmarks.quality import ROOT, common_flags, rows, run, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--row", default="digits", choices=rows(), metavar="ROW")
    parser.add_argument("--bits", default="3,3.5,4,5", help="comma list of budgets, ascending")
    parser.add_argument("--own", help="comma list of the budgets with a run of their own; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    bits = arguments.bits.split(",")
    shared, output = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    row = rows()[arguments.row]
    flags = [*common_flags(arguments.row, row, shared, output), *shlex.split(row.budget), "--search", "--quiet"]
    alone = bits if arguments.own is None else arguments.own.split(",")
    if unknown := set(alone) - set(bits):
        parser.error(f"--own {min(unknown)}: is none of --bits {arguments.bits}")
    heads = " | ".join(f"{b} bits: of all" + " / own run" * (b in alone) + " [%]" for b in bits)
    print(f"{arguments.row}\n\n| seed | {heads} | time of one for all / of an own one |")
    print("|---" * (len(bits) + 2) + "|")
    apart: list[list[float]] = []
    for seed in arguments.seeds.split(","):
        last, folder = run([*flags, "--target_bits", ",".join(bits), "--seed", seed], f"all-budgets-s{seed}")
        of_all = [json.loads((folder / f"{b}b" / "result.json").read_text()) for b in bits[:-1]] + [last]
        own = {b: run([*flags, "--target_bits", b, "--seed", seed], f"only-{b}b-s{seed}")[0] for b in alone}
        scores = {
            b: (score(record), score(own[b]) if b in own else None) for b, record in zip(bits, of_all, strict=True)
        }
        apart.append([one - other for one, other in scores.values() if other is not None])
        ratio = last["wall_seconds"] / mean(record["wall_seconds"] for record in own.values())
        cells = (f"{one:.2f}" if other is None else f"{one:.2f} / {other:.2f}" for one, other in scores.values())
        print(f"| {seed} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    means = iter([mean(column) for column in zip(*apart, strict=True)])
    cells = (f"{next(means):+.2f}" if b in alone else "" for b in bits)
    print(f"| mean difference [points] | {' | '.join(cells)} | |\n\n{date.today()}")


if __name__ == "__main__":
    main()
