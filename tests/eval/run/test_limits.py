import json

import pytest

from eval.config.parser import parse
from eval.eval_run import main
from eval.run.limits import read_latencies
from eval.run.plan import make_plan
from quant.errors import UserError
from quant.formats import parse_format

RUN = ["--task", "digits", "--model", "convnet", "--search", "--search_space", "2,4,8", "--max_train_samples", "200"]


def test_every_limit_holds_and_is_recorded(tmp_path, capsys):
    plan = make_plan(parse(RUN))
    rows = ["layer,weight_format,activation_format,ms"]
    for layer in plan.layers:
        rows += [f"{layer},int{bits},int{bits},{bits / 10}" for bits in (2, 4, 8)]
    table = tmp_path / "ms.csv"
    table.write_text("\n".join(rows))
    limit = 0.3 * len(plan.layers)
    flags = [
        "--max_memory",
        "0.008",
        "--max_compute",
        "0.02",
        "--max_latency",
        str(table),
        "--latency_target",
        str(limit),
    ]
    more = [
        "--max_steps",
        "12",
        "--seed",
        "1",
        "--report_to",
        "none",
        "--output_root_dir",
        str(tmp_path),
        "--run_id",
        "x",
    ]
    assert main([*RUN, *flags, *more]) == 0
    record = json.loads((tmp_path / "digits" / "default" / "x" / "result.json").read_text())
    assert [entry["name"] for entry in record["limits"]] == ["memory", "compute", "latency"]
    assert all(entry["value"] <= entry["limit"] * (1 + 1e-12) for entry in record["limits"])
    latency = sum(int(pair[0].removeprefix("int")) / 10 for pair in record["assignment"].values())
    assert record["limits"][2]["value"] == pytest.approx(latency)
    assert record["cost_target"] == 0.008 and record["cost"] <= 0.008
    assert f"compute: {record['limits'][1]['value']:.6g} GBOPs (limit 0.02)" in capsys.readouterr().out


def test_a_single_limit_becomes_the_target():
    config = parse([*RUN, "--max_compute", "0.5"])
    assert (config.cost_type, config.cost_target, config.target_bits) == ("compute", 0.5, None)
    config = parse([*RUN, "--cost_type", "compute", "--max_memory", "1"])
    assert (config.cost_type, config.cost_target, config.target_bits) == ("compute", None, "8")
    config = parse([*RUN, "--max_memory", "1", "--target_bits", "4"])
    assert (config.cost_type, config.cost_target, config.target_bits) == ("memory", None, "4")


def test_infeasible_limits_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="no assignment meets all limits: --target_bits") as told:
        make_plan(parse([*RUN, "--target_bits", "8", "--max_memory", "0.02", "--max_compute", "0.0001"]))
    assert "--max_memory 0.02 MiB (reachable: 0.0" in str(told.value)
    assert "--max_compute 0.0001 GBOPs (reachable: 0.0" in str(told.value)
    assert str(told.value).endswith(", not even alone)") and str(told.value).count("not even alone") == 1


def test_errors_name_the_flag_of_a_limit_that_became_the_target():
    with pytest.raises(UserError, match=r"^--max_memory 0\.005 MiB, but assignments .* cost 0\.00"):
        make_plan(parse([*RUN, "--max_memory", "0.005", "--max_compute", "0.0045"]))
    with pytest.raises(UserError, match=r"limits: --max_memory 0\.012 MiB .*, --max_compute") as told:
        make_plan(parse([*RUN, "--max_memory", "0.012", "--max_compute", "0.001"]))
    assert str(told.value).count("--") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,weight_format,ms\n", "column activation_format is missing"),
        ("layer,weight_format,activation_format,ms\na,int4,int4,fast\n", "line 2: could not convert"),
        ("layer,weight_format,activation_format,ms\na,int99,int4,1\n", "line 2: "),
        ("layer,weight_format,activation_format,ms\na,int4,int4,-1\n", "line 2: ms must be"),
        (
            "layer,weight_format,activation_format,ms\na,int4,int4,1\na,4,4,2\n",
            "line 3: a in int4/int4 stands there twice",
        ),
        ("layer,weight_format,activation_format,ms\na,int4\n", "line 2"),
    ],
)
def test_an_invalid_latency_table_is_a_one_line_error(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_latencies(tmp_path / "t.csv")


def test_latencies_accept_every_spelling_of_a_format(tmp_path):
    (tmp_path / "t.csv").write_text("layer,weight_format,activation_format,ms,note\na,4,fp8,1.5,x\n")
    assert read_latencies(tmp_path / "t.csv") == {("a", parse_format("int4"), parse_format("e4m3")): 1.5}


def test_missing_latencies_are_not_interpolated(tmp_path):
    (tmp_path / "t.csv").write_text("layer,weight_format,activation_format,ms\nconv1,int4,int4,1\n")
    with pytest.raises(UserError, match=r"no line for .* in int2/int2; python -m eval.latency measures it"):
        make_plan(parse([*RUN, "--max_latency", str(tmp_path / "t.csv"), "--latency_target", "3"]))
    with pytest.raises(UserError, match="--latency_target is missing"):
        parse([*RUN, "--max_latency", str(tmp_path / "t.csv")])


def test_an_exhaustive_search_of_a_large_space_is_refused():
    argv = [*RUN[:4], "--method", "exhaustive", "--search_space", "2,3,4,5,6,8", "--target_bits", "4"]
    with pytest.raises(UserError, match=r"--method exhaustive: 7.78e\+03 assignments .* at most 4096"):
        make_plan(parse(argv))
