"""Tuning, early stopping, plans and files of a launch; what can be seen while it works, and by whom."""

import re
import stat
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.journeys.conftest import record_of
from tests.journeys.launches import at_work, checkpoints, ended, until

COMMON = "--task digits --model convnet --from_scratch --train_batch_size 64 --max_train_samples 300 --device cpu"
SEARCH = f"{COMMON} --search --search_space 4,8 --policy_prior none --max_steps 30"
ONE_CPU = "--num_cpus 1 --cpus_per_trial 1"


def ray_folder(processes: list[psutil.Process]) -> Path:
    """Where the Ray of a launch keeps its files, as its processes were told."""
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            if found := re.search(r"(/\S*/mpq-ray-[^/\s]+)/ray/session_", " ".join(process.cmdline())):
                return Path(found[1])
    raise LookupError("no process of Ray")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder, how the launch ended, what was seen while it was at work)."""
    root = tmp_path_factory.mktemp("tuned")
    log, folder = root / "log", root / "digits" / "default"
    with at_work(f"python eval_parallel.py {SEARCH} --hpo 2 {ONE_CPU} --output_root_dir {root}", log) as launch:
        until(launch, lambda: [run for run in folder.glob("convnet-search-*") if checkpoints(run)])
        dashboard = re.search(r"^Dashboard: (http://[\d.:]+)", log.with_suffix(".err").read_text(), re.MULTILINE)[1]
        page = urllib.request.urlopen(dashboard, timeout=60)
        asked = None
        try:
            urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=60)
        except urllib.error.HTTPError as error:
            asked = error.code
        processes = psutil.Process(launch.pid).children(recursive=True)
        mine = {launch.pid, *(process.pid for process in processes)}
        own = ray_folder(processes)
        heard = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid in mine]
        seen = {
            "page": page.status,
            "asked": asked,
            "dashboard": dashboard,
            "heard_at": [one.laddr.ip for one in heard],
            "mode": stat.S_IMODE(own.stat().st_mode),
            "token": stat.S_IMODE((Path.home() / ".ray" / "auth_token").stat().st_mode),
        }
        done = ended(launch, log)
    assert done.code == 0, done.out + done.err
    seen["left"] = [one for one in (own, *Path("/tmp/ray").glob(f"session_*_{launch.pid}")) if one.exists()]
    return folder, done, seen


def test_the_dashboard_answers_here_and_nothing_listens_to_other_machines(tuned):
    _, _, seen = tuned
    assert seen["page"] == 200
    assert seen["asked"] == 401, "who has no token is told nothing of the runs"
    assert seen["dashboard"].startswith("http://127.0.0.1:")
    assert len(seen["heard_at"]) > 5
    assert set(seen["heard_at"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_what_ray_writes_is_for_its_owner_and_goes_with_the_launch(tuned):
    _, _, seen = tuned
    assert seen["mode"] == 0o700
    assert seen["token"] == 0o600
    assert not seen["left"]


def test_tuning_names_the_best_settings_and_leaves_curves_that_can_be_read(tuned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, done, _ = tuned
    runs = sorted(folder.glob("convnet-search-6b-s42-beta*"))
    assert len(runs) == 2 and all(record_of(run)["status"] == "finished" for run in runs)
    assert re.search(r"^Best on the validation split .*--cost_beta [\d.]+ --rl_learning_rate", done.out, re.MULTILINE)
    curves = EventAccumulator(str(runs[0] / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {"train/loss", "train/search/cost"} <= set(curves.Tags()["scalars"])
    assert all(event.value > 0 for event in curves.Scalars("train/loss"))
    of_tune = [path for path in (folder / "tune").rglob("*") if path.is_file()]
    assert len(of_tune) >= 2 and all(path.name.startswith("events.out.tfevents") for path in of_tune)
    compared = EventAccumulator(str(of_tune[0].parent)).Reload()
    assert compared.Tags()["scalars"]


def test_hopeless_runs_are_stopped_and_the_others_finish(command, tmp_path):
    line = f"python eval_parallel.py {COMMON} --methods float --seeds 0,1,2 --max_steps 30 --asha {ONE_CPU}"
    done = command(f"{line} --output_root_dir {tmp_path}")
    ends = {
        name: how for name, how in re.findall(r"^(convnet-float-s\d) +(accuracy|failed: stopped early)", done.out, re.M)
    }
    assert len(ends) == 3 and "accuracy" in ends.values()
    again = command(f"{line} --output_root_dir {tmp_path}")
    assert "finished" not in again.err, "what was given up stays given up"


def test_a_plan_is_printed_and_nothing_else_happens(command, tmp_path):
    done = command(f"python eval_parallel.py {SEARCH} --seeds 0,1 --dry_run --output_root_dir {tmp_path / 'out'}")
    assert "2 runs, one at a time about" in done.out and not (tmp_path / "out").exists()
    rows = [line.split() for line in done.out.splitlines() if line.startswith("convnet-search-6b-s")]
    assert [row[1] for row in rows] == ["30", "30"]


def test_the_file_of_a_run_makes_the_run_again(command, tuned, tmp_path):
    folder, _, _ = tuned
    run = sorted(folder.glob("convnet-search-6b-s42-beta*"))[0]
    command(f"python eval/eval_run.py --config {run / 'config.yaml'} --output_root_dir {tmp_path} --quiet")
    first, second = record_of(run), record_of(tmp_path / "digits" / "default" / run.name)
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}
