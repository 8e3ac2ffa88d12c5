"""The demo's commands are ones that the launcher takes: a renamed flag must not break `make demo` unseen."""

import shlex

from benchmarks.demo import RUNS, STEPS
from eval.config.parser import read_flags
from eval.launch.grid import expand


def test_the_demo_asks_for_float_int4_int8_and_a_search_below_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = RUNS / "float" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    launches = [shlex.split(command)[1:] for command in STEPS.values() if command.startswith("eval_parallel.py")]
    runs = [run for flags in launches for run in expand(read_flags(flags))]
    assert [(run.method, run.bits, run.target_bits) for run in runs] == [
        ("float", None, None),
        ("uniform", "4", None),
        ("uniform", "8", None),
        ("search", None, "3.5"),
    ]
    assert all(run.experiment_folder == tmp_path / RUNS for run in runs)
    assert runs[0].run_folder / "model" / "model.safetensors" == tmp_path / weights
    assert len({(run.max_steps, run.train_batch_size) for run in runs}) == 1
