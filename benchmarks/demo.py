"""The main job in four minutes: `make demo`.

A small network learns handwritten digits in float; from its weights int4, int8 and a search over 2, 4 and 8 bits are
trained for equally many steps; the report puts them side by side. Each command is printed as one would type it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eval.commands import python

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("output/digits/demo")
MODEL = "--task digits --model convnet --exp_name demo --seed 0 --cost_type compute"
TRAINING = "--max_steps 200 --train_batch_size 64 --cpus_per_trial 1"
FLOAT = f"eval_parallel.py {MODEL} {TRAINING} --from_scratch --learning_rate 3e-3 --method float --run_id float"
TUNE = f"eval_parallel.py {MODEL} {TRAINING} --learning_rate 1e-3 --load_model_path {RUNS}/float"
SEARCH = f"{TUNE} --search --search_space 2,4,8"
REPORT = f"eval/eval_parse.py {RUNS} --html {RUNS}/report/report.html"
STEPS = {
    "Train the float model that all others start from": FLOAT,
    "Every layer in int4, every layer in int8": f"{TUNE} --methods uniform --targets 4,8",
    "Search a format for each layer, at the cost that 3.5 bits everywhere would have": f"{SEARCH} --target_bits 3.5",
    "Report": REPORT,
}


def main(more: Sequence[str] = ()) -> int:
    """Run the steps, then say where the pictures are and what to try next; the exit code of the first that fails.

    `more`: flags that every launch gets besides.
    """
    started = time.monotonic()
    for number, (title, step) in enumerate(STEPS.items(), 1):
        line = shlex.join([*shlex.split(step), *more]) if step != REPORT else step
        print(f"\n[{number}/{len(STEPS)}] {title}\n$ {python()} {line}", flush=True)
        failed = subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT).returncode
        if failed:
            return failed
    print(
        f"""
Done in {time.monotonic() - started:.0f} s. Look at
  {RUNS}/report/report.html   everything on one page
  {RUNS}/report/pareto.png    accuracy against cost
  {RUNS}/report/formats.png   the format that the search chose for each layer
Next:
  {python()} {SEARCH} --targets 3,4,5,6
  {python()} {REPORT}
  {python()} eval_parallel.py --help"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
