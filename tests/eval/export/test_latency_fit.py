"""Latency tables that sum to whole models, and the comparison with the target at the end of a run."""

import json

import numpy as np
import pytest

from eval.config.parser import parse
from eval.eval_run import run
from eval.export.latency_fit import LatencyFit, draw, solve, uniform
from eval.run.record import outcome
from eval.run.stopwatch import stopwatch_line

PAIRS = [("float", "float"), ("int4", "int4"), ("int8", "int8")]


def test_a_fit_finds_what_models_are_made_of():
    generator = np.random.default_rng(0)
    alone = {f"layer{n}": dict(zip(PAIRS, generator.uniform(0.1, 1, 3), strict=True)) for n in range(12)}
    truth, offset = dict(zip(PAIRS, (0.5, 0.3, 0.2), strict=True)), 0.07

    def whole(assignment):
        return offset + sum(truth[pair] * alone[layer][pair] for layer, pair in assignment.items())

    fitted = [*uniform(alone, PAIRS), *draw(alone, 16)]
    scales, found = solve(alone, PAIRS, fitted, [whole(assignment) for assignment in fitted])
    assert found == pytest.approx(offset) and scales == pytest.approx(truth)
    held_out = draw(alone, 6, seed=1)
    assert not any(assignment in fitted for assignment in held_out)
    noisy = [whole(assignment) * generator.uniform(0.9, 1.1) for assignment in fitted]
    scales, found = solve(alone, PAIRS, fitted, noisy)
    assert min(scales.values()) >= 0 and found >= 0


def test_the_error_is_that_of_models_the_table_was_not_fitted_to():
    fit = LatencyFit({"int8/int8": 0.3}, 0.1, 16, [(1.1, 1.0), (1.8, 2.0)])
    assert fit.error == pytest.approx(0.1)
    assert json.loads(json.dumps(fit.as_json()))["mean_relative_error"] == pytest.approx(0.1)


@pytest.mark.parametrize(("ms", "kept"), [(1.5, "within"), (2.0, "within"), (2.5, "NOT within")])
def test_the_outcome_compares_the_stopwatch_with_the_target(ms, kept):
    line = stopwatch_line({"measured_latency": {"ms": ms, "target_ms": 2.0}})
    assert line == f"exported file: {ms:.4g} ms on ONNX Runtime, one thread: {kept} 2 ms"
    assert "not timed: package" in stopwatch_line({"measured_latency": {"target_ms": 2.0, "reason": "package"}})
    assert stopwatch_line({}) is None


def test_a_run_under_a_latency_target_times_its_export(tmp_path):
    pytest.importorskip("onnxruntime")
    table = tmp_path / "latency.csv"
    flags = (
        "--task digits --model convnet --search --search_space 4,8 --max_steps 8 --policy_prior none --quiet "
        f"--save_strategy no --report_to none --output_root_dir {tmp_path}"
    )
    dry = parse(flags.split())
    from eval.run.plan import make_plan

    layers = make_plan(dry).layers
    rows = [f"{layer},{name},{name},0.1" for layer in layers for name in ("float", "int4", "int8")]
    table.write_text("\n".join(["layer,weight_format,activation_format,ms", *rows]) + "\n")
    record = run(parse(f"{flags} --max_latency {table} --latency_target 1000".split()))
    found = record["measured_latency"]
    assert found["target_ms"] == 1000 and 0 < found["ms"] < 1000
    (line,) = [line for line in outcome(record) if line.startswith("exported file: ")]
    assert line.endswith("within 1000 ms")
