"""Runs are not written outside of --output_root_dir through a link; the output folder itself may be a link."""

import pytest

import eval_parallel
from eval.config.parser import parse
from eval.launch.ray_cluster import clean
from quant.errors import UserError

RUN = ["--task", "digits", "--model", "resnet20", "--exp_name", "mine", "--run_id", "one", "--device", "cpu"]


@pytest.mark.parametrize(
    ("link", "flag"),
    [("digits", "--task digits"), ("digits/mine", "--exp_name mine"), ("digits/mine/one", "--run_id one")],
)
def test_a_link_out_of_the_output_folder_is_refused(tmp_path, link, flag):
    root, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(elsewhere)
    given = [*RUN, "--output_root_dir", str(root)]
    with pytest.raises(UserError, match=f"^{flag}: .* is a link to {elsewhere}") as caught:
        parse(given)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=f"^{flag}: "):
        eval_parallel.main(given, runner=pytest.fail)
    assert not list(elsewhere.iterdir())


def test_the_output_folder_may_be_a_link_and_links_may_stay_within_it(tmp_path):
    (tmp_path / "disk" / "digits" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "digits" / "mine").symlink_to("real")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert parse([*RUN, "--output_root_dir", str(tmp_path / "out")]).run_name == "one"


def test_a_launch_removes_nothing_behind_a_link(tmp_path):
    """A launch removes the files in its `tune` folder at its start and end."""
    kept = tmp_path / "elsewhere" / "thesis.tex"
    kept.parent.mkdir()
    kept.touch()
    tune = tmp_path / "out" / "digits" / "mine" / "tune"
    tune.parent.mkdir(parents=True)
    tune.symlink_to(kept.parent)
    with pytest.raises(UserError, match=r"^--exp_name tune: .* is a link"):
        eval_parallel.main([*RUN, "--output_root_dir", str(tmp_path / "out")], runner=pytest.fail)
    tune.unlink()
    tune.mkdir()
    (tune / "inner").symlink_to(kept.parent)
    clean(tune)
    assert kept.exists() and not list(tune.iterdir())
