"""The launcher without Ray: grid, states of runs, resources, output, and errors before the start."""

import functools
import importlib.util
import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_parallel
from eval.config.parser import read_flags, to_yaml
from eval.launch.estimates import RunEstimate
from eval.launch.grid import RunState, by_name, expand, launch_folder, read_state
from eval.launch.hyperparameters import check_tuning, tried
from eval.launch.progress import Watch, last_entry, note_lines, result_table, watching
from eval.launch.ray_cluster import check_request, clean, plan_share, ray_session
from eval.launch.state import locked, read_launch, set_aside, write_launch
from eval.launch.trial import Reporter, _run_within_memory, is_out_of_memory, objective, record_failure, with_settings
from eval.run.progress import duration, make_console
from quant.errors import UserError

RUN = ["--task", "digits", "--model", "resnet20"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The module whose `run` replaces `eval.eval_run.run`, with a real record."""
    spec = importlib.util.spec_from_file_location("fake_launcher", Path(__file__).parent / "fake_launcher.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = json.loads(module.real_record(tmp_path_factory.mktemp("real")).read_text())
    module.run = functools.partial(module.run, real=real)
    return module


def runs_of(*argv: str):
    return expand(read_flags([*RUN, *argv]))


def names(*argv: str) -> list[str]:
    return [run.run_name for run in runs_of(*argv)]


def test_the_grid_is_the_product_of_its_lists():
    found = names("--methods", "search", "--search_space", "2,4,8", "--targets", "4.2,5", "--seeds", "0,1")
    assert found == [f"resnet20-search-{target}-s{seed}" for target in ("4.2b", "5b") for seed in (0, 1)]
    both = runs_of("--seeds", "0", "--bits", "4")
    assert [run.method for run in both] == ["uniform"]
    many = expand(read_flags(["--tasks", "digits,cifar10", "--models", "resnet20,resnet32"]))
    assert [(run.task, run.model) for run in many] == [
        (task, model) for model in ("resnet20", "resnet32") for task in ("digits", "cifar10")
    ]


def test_each_method_of_a_grid_keeps_the_flags_it_uses():
    found = names("--methods", "search,uniform,float", "--search_space", "2,4,8", "--targets", "4.2,4.5,6")
    assert found == [
        *("resnet20-search-4.2b-s42", "resnet20-search-4.5b-s42", "resnet20-search-6b-s42"),
        *("resnet20-uniform-int4-s42", "resnet20-uniform-int6-s42", "resnet20-float-s42"),
    ]
    assert names("--methods", "greedy,uniform", "--bits", "4", "--target_bits", "6") == [
        "resnet20-greedy-6b-s42",
        "resnet20-uniform-int4-s42",
    ]
    assert names("--methods", "search,float", "--fuse_groups") == [
        "resnet20-search-fused-6b-s42",
        "resnet20-float-s42",
    ]
    assert names("--methods", "search,uniform", "--bits", "4") == [
        "resnet20-search-6b-s42",
        "resnet20-uniform-int4-s42",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        "--methods search,uniform --cost_target 0.1",
        "--methods search,uniform --bits 4 --max_memory 0.1",
        "--methods search,uniform,float --max_memory 0.1 --max_compute 0.2 --target_bits 5",
        "--methods search,float --verify_retrain --distill 0.5 --gamma_migration",
        "--methods search,float --smooth_quant --smooth_quant_alpha auto --quantize_residual_adds",
        "--methods search,float --high_precision_ops softmax --max_drop 0.01",
    ],
)
def test_the_flags_of_one_method_are_not_errors_for_the_others(flags):
    search, *others = runs_of(*flags.split())
    assert search.method == "search" and len(others) == flags.count(",")
    for run in others:
        budget = (run.cost_target, run.target_bits, run.max_memory, run.max_compute, run.max_drop)
        if run.method == "float" or run.bits is not None:
            assert set(budget) == {None} and not run.verify_retrain
        else:  # the best uniform within the budget
            assert budget == (search.cost_target, search.target_bits, search.max_memory, search.max_compute, None)


def test_equivalent_spellings_of_numbers_are_the_same_run(tmp_path, fake):
    given = ["--search", "--max_steps", "3", "--output_root_dir", str(tmp_path)]
    fake.run(runs_of(*given, "--target_bits", "6.0")[0])
    for same in (["--targets", "6"], ["--target_bits", "6", "--search_space", "int4,int8"]):
        assert read_state(runs_of(*given, *same)[0]).finished, same


def test_names_of_runs_include_the_task_if_there_are_several(tmp_path):
    given = ["--model", "resnet20", "--output_root_dir", str(tmp_path), "--log_dir", str(tmp_path / "logs")]
    runs = expand(read_flags(["--tasks", "digits,cifar10", "--seeds", "0,1", *given]))
    assert list(by_name(runs)) == [f"{t}/resnet20-float-s{s}" for t in ("digits", "cifar10") for s in (0, 1)]
    assert len({run.log_dir for run in runs}) == 4
    assert list(by_name(runs_of("--seeds", "0,1"))) == ["resnet20-float-s0", "resnet20-float-s1"]


def test_a_cluster_may_have_gpus_that_the_head_node_lacks():
    flags = ["--device", "cuda", "--cuda_visible_devices", ""]
    (run,) = runs_of(*flags, "--ray_address", "auto")
    assert (run.device, run.ray_address, run.cuda_visible_devices) == ("cuda", None, None)
    with pytest.raises(UserError, match="--device cuda: no GPU"):
        runs_of(*flags)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "0,x"], ["--seeds 0,x", "'x'"]),
        (["--seeds", "0,0"], ["--seeds 0,0", "twice"]),
        (["--seeds", "0,"], ["--seeds 0,"]),
        (["--targets", "4.2,nan", "--search"], ["--target_bits", "nan"]),
        (["--targets", "4.2,9", "--search"], ["--target_bits 9", "4 to 8"]),
        (["--methods", "search,best"], ["--method", "'best'"]),
        (["--seed", "3", "--seeds", "0,1"], ["--seeds", "--seed 3"]),
        (["--cpus_per_trial", "0"], ["--cpus_per_trial", "(0, inf)", "0"]),
        (["--gpus_per_trial", "-0.5"], ["--gpus_per_trial", "-0.5"]),
        (["--num_cpus", "0"], ["--num_cpus", "got 0"]),
        (["--search", "--hpo", "0"], ["--hpo", "got 0"]),
        (["--run_id", "tune"], ["--run_id tune", "choose another"]),
        (["--models", "resnet20,resnet21"], ["--models contradicts --model resnet20"]),
        (["--seeds", "0,1", "--run_id", "a"], ["--run_id a", "2"]),
        (["--seeds", "0,1", "--save_model_path", "a"], ["--save_model_path a", "2"]),
        (["--methods", "uniform"], ["--method uniform", "--bits"]),
        (["--methods", "search", "--targets", "4.20000001,4.2", "--search_space", "2,8"], ["share the folder", "4.2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_invalid_grid_is_an_error_that_names_the_flag(argv, words):
    with pytest.raises(UserError) as caught:
        runs_of(*argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_paths_of_trials_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    run = runs_of("--task", "cifar10", "--data_dir", "data", "--log_dir", "logs")[0]
    assert (run.data_dir, run.log_dir) == (str(tmp_path / "data"), str(tmp_path / "logs"))
    assert run.run_folder == tmp_path / "output" / "cifar10" / "default" / "resnet20-float-s42"
    assert [Path(run.log_dir).name for run in runs_of("--log_dir", "logs", "--seeds", "0,1")] == [
        "resnet20-float-s0",
        "resnet20-float-s1",
    ]


def test_two_tasks_share_a_launch_folder_of_their_own(tmp_path):
    config = read_flags(["--tasks", "digits,cifar10", "--model", "resnet20", "--output_root_dir", str(tmp_path)])
    assert launch_folder(expand(config)) == tmp_path / "digits+cifar10" / "default"


def test_the_record_decides_whether_a_run_is_finished(tmp_path, fake):
    run = runs_of("--max_steps", "3", "--output_root_dir", str(tmp_path))[0]
    assert (read_state(run).finished, read_state(run).reason) == (False, None)
    fake.run(run)
    assert read_state(run).finished
    record = run.run_folder / "result.json"
    whole = record.read_text()
    record.write_text(whole[: len(whole) // 2])
    assert not read_state(run).finished and "truncated" in read_state(run).reason
    record.write_text(whole.replace('"finished"', '"failed"'))
    assert read_state(run).failed
    set_aside([run])
    assert not record.exists() and not read_state(run).failed and not read_state(run).finished


def test_a_failure_before_the_start_of_the_run_is_recorded(tmp_path):
    run = runs_of("--output_root_dir", str(tmp_path))[0]
    record_failure(run, "no disk")
    assert read_state(run).failed and read_state(run).reason == "failed: no disk"


def test_a_folder_of_a_run_with_other_flags_is_refused(tmp_path, fake):
    given = ["--max_steps", "3", "--output_root_dir", str(tmp_path)]
    fake.run(runs_of(*given)[0])
    for same in (
        ["--log_steps", "5"],
        ["--num_cpus", "1"],
        ["--train_batch_size", "16", "--gradient_accumulation_steps", "2"],
    ):
        assert read_state(runs_of(*given, *same)[0]).finished, same
    with pytest.raises(UserError, match=r"--learning_rate 0.1 \(there: 5e-05\)"):
        read_state(runs_of(*given, "--learning_rate", "0.1")[0])
    (runs_of(*given)[0].run_folder / "config.yaml").write_text("task: [")
    with pytest.raises(UserError, match="not readable"):
        read_state(runs_of(*given)[0])


def test_resume_works_for_a_moved_launch(tmp_path):
    folder = tmp_path / "moved" / "digits" / "mine"
    folder.mkdir(parents=True)
    started = read_flags([*RUN, "--seeds", "0,1", "--output_root_dir", "/elsewhere", "--exp_name", "mine"])
    assert write_launch(folder, started, expand(started)) is None
    config = read_launch(["--resume", str(folder), "--num_cpus", "1"])
    assert (config.seeds, config.num_cpus, config.resume) == ("0,1", 1, None)
    assert launch_folder(expand(config)) == folder
    with pytest.raises(UserError, match=r"--resume .*no launch.yaml"):
        read_launch(["--resume", str(tmp_path)])
    for flags in (["--exp_name", "other"], ["--output_root_dir", "x"]):
        with pytest.raises(UserError, match=f"{flags[0]} {flags[1]} contradicts --resume"):
            read_launch(["--resume", str(folder), *flags])


def test_the_flags_of_an_unfinished_launch_are_kept(tmp_path, fake):
    def start(seeds):
        config = read_flags([*RUN, "--seeds", seeds, "--max_steps", "3", "--output_root_dir", str(tmp_path)])
        return config, expand(config), launch_folder(expand(config))

    (first, runs, folder), (second, more, _) = start("0,1"), start("2")
    folder.mkdir(parents=True)
    assert write_launch(folder, first, runs) is None
    assert write_launch(folder, first, runs) is None, "the same launch again"
    fake.run(runs[0])
    kept = write_launch(folder, second, more)
    assert kept == folder / "launch.1.yaml"
    again = read_launch(["--resume", str(kept)])
    assert [run.seed for run in expand(again)] == [0, 1] and launch_folder(expand(again)) == folder
    assert write_launch(folder, again, expand(again)) == folder / "launch.2.yaml"
    assert not kept.exists(), "it goes on, as the launch of this folder"
    for run in (runs[1], *more):
        fake.run(run)
    assert write_launch(folder, second, more) is None, "nothing was left to do"


def test_a_second_launch_into_one_folder_is_refused(tmp_path):
    with locked([tmp_path / "a"]), pytest.raises(UserError, match="another launch"), locked([tmp_path / "a"]):
        pass
    with locked([tmp_path / "a"]):
        pass


def test_a_folder_that_cannot_be_written_is_named():
    with (
        pytest.raises(UserError, match="--output_root_dir: cannot write in /proc/nowhere"),
        locked([Path("/proc/nowhere")]),
    ):
        pass


CPU, GPU = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("flags", "nodes", "runs", "expected"),
    [
        ([], [CPU], 5, (8, 0, 1)),
        (["--cpus_per_trial", "2"], [CPU], 5, (2, 0, 4)),
        (["--cpus_per_trial", "2"], [CPU], 3, (2, 0, 3)),
        ([], [GPU], 8, (4, 1, 4)),
        ([], [GPU], 2, (8, 1, 2)),
        (["--gpus_per_trial", "0.5"], [GPU], 8, (2, 0.5, 8)),
        (["--gpus_per_trial", "0.4", "--cpus_per_trial", "1"], [GPU], 16, (1, 0.4, 8)),
        (["--gpus_per_trial", "0.6", "--cpus_per_trial", "1"], [GPU], 16, (1, 0.6, 4)),
        (["--device", "cpu"], [GPU], 8, (16, 0, 1)),
        ([], [CPU, CPU], 5, (8, 0, 2)),
        ([], [CPU, GPU], 9, (4, 1, 4)),
        (["--ray_address", "auto", "--num_cpus", "8", "--cpus_per_trial", "4"], [CPU, CPU], 9, (4, 0, 2)),
        (["--ray_address", "auto", "--num_gpus", "2"], [GPU, GPU], 9, (4, 1, 2)),
    ],
)
def test_resources_are_divided_among_runs(flags, nodes, runs, expected):
    share = plan_share(read_flags(flags), nodes, runs)
    assert (share.cpus, share.gpus, share.concurrent) == expected


@pytest.mark.parametrize(
    "flags", [["--cpus_per_trial", "9"], ["--gpus_per_trial", "1"], ["--cpus_per_trial", "17", "--gpus_per_trial", "1"]]
)
def test_an_error_about_missing_resources_lists_the_available_ones(flags):
    with pytest.raises(UserError, match=r"8 CPU, 0 GPU"):
        plan_share(read_flags(flags), [CPU], 3)


@settings(deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"CPU": st.integers(1, 64), "GPU": st.integers(0, 8)}), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([None, 0.25, 0.5, 1.0]),
)
def test_shares_never_exceed_the_resources(nodes, runs, gpus):
    flags = [] if gpus is None else ["--gpus_per_trial", str(gpus)]
    try:
        share = plan_share(read_flags(flags), nodes, runs)
    except UserError:
        assert gpus is not None and all(node["GPU"] < gpus for node in nodes)
        return
    assert 1 <= share.concurrent <= runs
    assert share.concurrent * share.cpus <= sum(node["CPU"] for node in nodes) + 1e-9
    assert share.concurrent * share.gpus <= sum(node["GPU"] for node in nodes) + 1e-9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_cpus", "100000"], "--num_cpus 100000: this machine has"),
        (["--num_gpus", "1", "--cuda_visible_devices", ""], "--num_gpus 1: this machine has 0"),
        (["--gpus_per_trial", "1", "--cuda_visible_devices", ""], "1 GPU"),
        (["--gpus_per_trial", "2"], "torchrun"),
        (["--ray_address", "ray://head:10001"], "--ray_address ray://head:10001"),
        (["--ray_address", "head"], "--ray_address head: choices: auto, or HOST:PORT"),
        (["--ray_address", "127.0.0.1:1"], "--ray_address 127.0.0.1:1: no cluster answers"),
        (["--num_cpus", "1", "--cpus_per_trial", "2"], "2 CPU"),
    ],
)
def test_missing_resources_are_an_error_before_ray_starts(flags, words):
    with pytest.raises(UserError, match=words):
        check_request(read_flags(flags), 1)


def test_out_of_memory_repeats_the_run_with_half_the_batch(tmp_path, fake):
    oom = functools.partial(fake.run, faults=["oom42"])
    run = runs_of("--max_steps", "3", "--output_root_dir", str(tmp_path))[0]
    record = _run_within_memory(oom, run, Reporter(lambda measures: None))
    assert "--train_batch_size 32: run with 16 and --gradient_accumulation_steps 2" in record["notes"][-1]
    assert json.loads((run.run_folder / "result.json").read_text()) == record
    assert read_state(run).finished, "the halved run counts as the one that was asked for"
    with pytest.raises(MemoryError):
        _run_within_memory(oom, run.updated(train_batch_size=33, run_id="odd"), Reporter(lambda measures: None))
    with pytest.raises(MemoryError):
        _run_within_memory(oom, run.updated(train_batch_size=64, run_id="big"), Reporter(lambda measures: None))


def test_only_memory_counts_as_out_of_memory():
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 GB"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_reports_to_tune_always_have_the_same_keys(monkeypatch):
    heard = []
    monkeypatch.setattr("eval.launch.trial.REPORT_SECONDS", 0.0)
    reporter = Reporter(heard.append)
    reporter({"step": 1, "loss": 2.0})
    reporter({"step": 2, "loss": 1.0, "reward": 0.5, "quality": 0.6, "cost": 3.0, "entropy": 1.0})
    record = {
        "status": "finished",
        "steps": 2,
        "cost": 3.0,
        "metric": "accuracy",
        "metrics": {"validation": {"accuracy": 0.9}},
    }
    reporter.finish(record)
    assert {frozenset(measures) for measures in heard} == {frozenset(heard[0])}
    assert heard[0]["score"] == pytest.approx(math.exp(-2.0))
    assert heard[1]["score"] == pytest.approx(0.8 * math.exp(-2.0) + 0.2 * 0.6)
    assert math.isnan(heard[1]["objective"]) and heard[2]["objective"] == 0.9
    assert objective({**record, "metric": "perplexity", "metrics": {"validation": {"perplexity": 12.0}}}) == -12.0


def test_trials_of_earlier_launches_are_found_by_their_settings(tmp_path, fake):
    base = runs_of("--search", "--max_steps", "3", "--output_root_dir", str(tmp_path))[0]
    drawn = with_settings(base, {"run": "x", "cost_beta": 0.123456, "rl_learning_rate": 0.02, "max_entropy_beta": 0.01})
    assert drawn.run_name == "resnet20-search-6b-s42-beta0.1235-lr0.02-entropy0.01"
    assert (drawn.cost_beta, base.cost_beta) == (0.1235, 1.0)
    assert with_settings(base, {"run": "x"}) == base
    fake.run(drawn)
    fake.run(drawn.updated(learning_rate=0.5, run_id="resnet20-search-6b-s42-other"))
    fake.run(base.updated(run_id="resnet20-search-6b-s42-untuned"))
    assert [known.config.run_name for known in tried(base)] == [drawn.run_name]


def test_hpo_needs_one_search():
    with pytest.raises(UserError, match=r"--hpo 8 .* a float run"):
        check_tuning(read_flags([*RUN, "--hpo", "8"]), runs_of())
    with pytest.raises(UserError, match=r"--hpo 16 .* 2 runs"):
        check_tuning(read_flags([*RUN, "--hpo"]), runs_of("--search", "--seeds", "0,1"))


def test_the_last_complete_line_of_a_history_is_read(tmp_path):
    path = tmp_path / "history.jsonl"
    assert last_entry(path) == {}
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert last_entry(path) == {"step": 2}
    assert last_entry(path, since=os.stat(path).st_mtime + 1) == {}
    path.write_text(
        '{"step": 1}\n' + json.dumps({"step": 2, "probabilities": [[0.5] * 40000]}) + "\n" + '{"step": 3}\n'
    )
    assert last_entry(path) == {"step": 3}


def shown(table) -> str:
    file = io.StringIO()
    make_console(file).print(table)
    return file.getvalue()


def test_progress_shows_step_cost_target_and_time_left(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("eval.launch.progress.time.monotonic", lambda: now[0])
    folders = {name: tmp_path / name for name in ("a", "b", "c")}
    for folder in folders.values():
        folder.mkdir()
    (folders["c"] / "result.json").write_text("{}")
    watch = Watch(lambda: folders, {"a": RunEstimate(100, (1.0, 4.0), 2.5)}.get, 4, "MiB")
    entry = {"step": 10, "phase": "search", "loss": 0.5, "reward": 0.25, "cost": 3.0, "entropy": 4.0}
    (folders["a"] / "history.jsonl").write_text(json.dumps(entry) + "\n")
    watch._started = 0.0
    assert "10/100 search" in shown(watch.render())
    now[0] += 10
    (folders["a"] / "history.jsonl").write_text(json.dumps({**entry, "step": 20}) + "\n")
    text = shown(watch.render())
    assert "20/100 search" in text and "3/2.5 MiB" in text and "80 s" in text
    assert "1 of 4 runs done, 2 waiting or starting, about 5 min left" in text  # 80 steps and 2 runs of 100, 1 a second


def test_without_a_terminal_each_change_of_state_is_one_line(tmp_path, fake, monkeypatch):
    runs = runs_of("--seeds", "0,1", "--max_steps", "3", "--output_root_dir", str(tmp_path))
    first, second = (run.run_name for run in runs)
    watch = Watch(
        lambda: {run.run_name: run.run_folder for run in runs}, {first: RunEstimate(3, (1.0, 4.0), 2.5)}.get, 2, "MiB"
    )
    watch._started -= 1  # a file's time is coarser than the clock's
    assert watch.news() == []
    for run in runs:
        run.run_folder.mkdir(parents=True)
        (run.run_folder / "run.log").touch()
    assert watch.news() == [f"{name}: started: reading data and model" for name in (first, second)]
    monkeypatch.setattr("eval.launch.progress.NEWS_SECONDS", 0.0)
    assert watch.news() == [], "a line that says nothing new is not repeated"
    state = {"phase": "calibrating", "done": 0, "total": None, "what": "", "seconds_left": None}
    (runs[0].run_folder / "progress.json").write_text(json.dumps(state))
    assert watch.news() == [f"{first}: calibrating"]
    (runs[0].run_folder / "progress.json").write_text(json.dumps({**state, "phase": "training", "total": 3}))
    assert watch.news() == [], "training without a first step is not a second start"
    monkeypatch.setattr("eval.launch.progress.NEWS_SECONDS", 30.0)
    history = runs[0].run_folder / "history.jsonl"
    for step, phase in ((1, "delay"), (2, "delay"), (3, "search")):
        history.write_text(json.dumps({"step": step, "phase": phase}) + "\n")
        assert watch.news() == ([] if step == 2 else [f"{first}: {phase}, step {step}/3"])
    fake.run(runs[0])
    record_failure(runs[1], "row 7 has no label")
    assert watch.news() == [
        f"{first}: finished: accuracy {fake.digest(runs[0]):.4f}, 1.5 MiB, 1 s",
        f"{second}: failed: row 7 has no label",
    ]
    assert watch.news() == []
    monkeypatch.setattr("eval.launch.progress.PLAIN_SECONDS", 60.0)
    watch._printed.clear()
    file = io.StringIO()
    with watching(watch, make_console(file)):
        pass
    assert file.getvalue().count("\n") == 2, "the last news is told when the launch ends"


def test_starting_ray_is_retried_before_it_is_an_error(monkeypatch, capsys):
    failures = []

    def slow(*args, **settings):
        if len(failures) < limit:
            failures.append(settings)
            raise Exception("The current node timed out during startup.\nThis could happen.")
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr("ray.init", slow)
    monkeypatch.setattr("eval.launch.ray_cluster.psutil.Process.children", lambda process, recursive: [])
    limit = 2
    with ray_session(read_flags(RUN)) as dashboard:
        assert dashboard == "127.0.0.1:8265"
        assert "attempt 2 at starting Ray: Exception: The current node timed out" in capsys.readouterr().out
    limit = 9
    with (
        pytest.raises(UserError, match=r"^Ray did not start .* in 3 attempts.* timed out"),
        ray_session(read_flags(RUN)),
    ):
        pass
    assert len(failures) == 5


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (45, "45 s"), (600, "10 min"), (3 * 3600, "3.0 h")])
def test_durations_are_formatted(seconds, text):
    assert duration(seconds) == text


def test_names_and_reasons_are_printed_without_markup(capsys):
    make_console(sys.stdout).print("expected list[int], got [batch, 3] in /out[v2]/:x: [/tmp]")
    assert capsys.readouterr().out == "expected list[int], got [batch, 3] in /out[v2]/:x: [/tmp]\n"


def test_the_result_table_names_every_run_once(tmp_path, fake):
    runs = runs_of("--seeds", "0,1,2", "--max_steps", "3", "--output_root_dir", str(tmp_path))
    fake.run(runs[0])
    record_failure(runs[1], "row 7 has no label")
    text = shown(result_table({run.run_name: read_state(run) for run in runs}, {}))
    assert [text.count(run.run_name) for run in runs] == [1, 1, 1]
    assert f"accuracy {fake.digest(runs[0]):.4f}" in text and "failed: row 7 has no label" in text
    assert "not started" in text


def test_a_note_is_printed_once_with_its_runs(tmp_path, fake):
    runs = runs_of("--seeds", "0,1,2,3", "--max_steps", "3", "--output_root_dir", str(tmp_path))
    for run, notes in zip(runs, (["random weights", "damaged"], *[["random weights"]] * 3), strict=True):
        record = fake.run(run)
        (run.run_folder / "result.json").write_text(json.dumps({**record, "notes": notes}))
    known = {run.run_name: read_state(run) for run in runs}
    assert note_lines(known) == ["note: random weights", "note: damaged (resnet20-float-s0)"]
    known = dict(reversed(known.items())) | {"another": RunState(runs[0], None, None)}
    assert note_lines(known)[0].endswith("(resnet20-float-s3, resnet20-float-s2, resnet20-float-s1 and 1 more)")


def test_a_run_with_several_budgets_has_a_row_for_each(tmp_path, fake):
    (whole,) = runs_of("--search", "--target_bits", "5,6", "--max_steps", "3", "--output_root_dir", str(tmp_path))
    fake.run(whole)
    (whole.run_folder / "5b").mkdir()
    record = json.loads((whole.run_folder / "result.json").read_text())
    record |= {"cost": 0.0625, "contest": {"within_drop": False, "max_drop": 0.01}}
    (whole.run_folder / "5b" / "result.json").write_text(json.dumps(record))
    first, second = shown(result_table({whole.run_name: read_state(whole)}, {})).splitlines()[1:3]
    assert first.startswith(f"{whole.run_name}/5b") and "0.0625" in first and "NOT within 0.01 of float" in first
    assert second.startswith(f"{whole.run_name} ") and "NOT" not in second


def test_only_tensorboard_events_of_tune_are_kept(tmp_path):
    for name in ("tuner.pkl", "run/params.pkl", "run/events.out.tfevents.1.host", "empty/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clean(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["run", "run/events.out.tfevents.1.host"]


def test_a_finished_launch_is_reported_without_ray(tmp_path, fake, capsys):
    argv = [*RUN, "--seeds", "0,1", "--max_steps", "3", "--output_root_dir", str(tmp_path)]
    for run in expand(read_flags(argv)):
        fake.run(run)
    assert eval_parallel.main(argv, runner=pytest.fail) == 0
    told = capsys.readouterr().out
    assert "eval/eval_parse.py" in told and "tensorboard --logdir" in told
    assert (tmp_path / "digits" / "default" / "launch.yaml").exists()

    argv = ["--tasks", "digits,cifar10", "--model", "resnet20", "--max_steps", "3", "--output_root_dir", str(tmp_path)]
    for run in expand(read_flags(argv)):
        fake.run(run)
    assert eval_parallel.main(argv, runner=pytest.fail) == 0
    told = capsys.readouterr().out
    assert f"eval/eval_parse.py {tmp_path}/digits/default {tmp_path}/cifar10/default\n" in told
    assert f"tensorboard --logdir {tmp_path}\n" in told
    assert [line.split()[0] for line in told.splitlines()[1:3]] == [
        f"{t}/resnet20-float-s42" for t in ("digits", "cifar10")
    ]


def test_a_dry_run_shows_steps_range_and_target_and_starts_nothing(tmp_path, capsys):
    argv = ["--task", "digits", "--model", "convnet", "--from_scratch", "--output_root_dir", str(tmp_path / "out")]
    argv += ["--methods", "search,uniform", "--search_space", "2,4,8", "--targets", "4", "--cost_type", "compute"]
    assert eval_parallel.main([*argv, "--max_steps", "20", "--dry_run"]) == 0
    told = capsys.readouterr().out
    search = next(line for line in told.splitlines() if line.startswith("convnet-search-4b-s42"))
    assert " 20 " in search and "0.001219 to 0.01951 GBOPs" in search and "0.004876 GBOPs" in search
    assert "2 runs" in told and not (tmp_path / "out").exists()


def test_an_infeasible_target_ends_the_launch_before_ray_starts(tmp_path):
    argv = ["--task", "digits", "--model", "convnet", "--from_scratch", "--output_root_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"--cost_target 1e-09 .* cost 0.0\d+ to 0.0\d+ MiB"):
        eval_parallel.main([*argv, "--search", "--cost_target", "1e-9"])


def test_the_flags_of_a_run_are_read_from_its_file(tmp_path):
    run = runs_of("--search", "--target_bits", "5", "--output_root_dir", str(tmp_path))[0]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(run))
    assert expand(read_flags(["--config", str(path)])) == [run]
