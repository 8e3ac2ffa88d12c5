"""Several faults in one launch, an interrupt in the next, and a third that finishes what is missing."""

import json
import re
import shlex
import signal

from tests.faults.launches import PATIENCE, Launch


def test_dead_workers_failures_and_an_interrupt_leave_every_record_once(tmp_path):
    launch = Launch(tmp_path, seeds="0,1,2,3")
    checkpoint = launch.folder_of(3) / "checkpoints" / "state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text('{"step": 2, "val')
    code, out, err = launch.run(faults="fail1,die0,oom2")
    assert code == 1, err
    launch.assert_undisturbed(0, 2)
    assert re.search(r"resnet20-float-s3 +failed: JSONDecodeError", out)
    assert launch.attempts(0) == 2 and "resnet20-float-s0: its process died" in err
    assert "failed: --data_dir: row 7 of train.csv has no label" in out
    assert "2 of 4 runs failed: resnet20-float-s1, resnet20-float-s3" in out
    assert "--train_batch_size 32" in json.loads((launch.folder_of(2) / "result.json").read_text())["notes"][-1]
    assert not list(tmp_path.rglob("*.pkl")), "no pickle is left behind"
    assert list(launch.folder.glob("tune/*/*/events.out.tfevents.*"))

    # The same command again, after a record was cut off, and stopped while it makes up what is missing.
    checkpoint.unlink()
    record = launch.folder_of(2) / "result.json"
    record.write_text(record.read_text()[:100])
    before = launch.attempts(0), launch.attempts(1)
    again = launch.start(faults="hold")
    launch.wait_for(1, before[1] + 1, again)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 130, err
    resume = shlex.split(out.strip().splitlines()[-1])
    assert resume[-2:] == ["--resume", str(launch.folder)]

    code, out, err = launch.run(command=resume)
    assert code == 0, err
    launch.assert_undisturbed(0, 1, 2, 3)
    assert launch.attempts(0) == before[0], "what is finished is left alone"
