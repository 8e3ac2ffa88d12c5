"""The picture of a searched architecture shows what a small search has left of each layer."""

import json

import pytest

from eval.report.architecture import kept_layers

WHOLE = [{"name": "a", "macs": 100, "params": 10}, {"name": "b", "macs": 40, "params": 4}]


def test_layers_are_shown_by_the_share_that_is_left():
    record = {
        "whole_layers": WHOLE,
        "layers": [{"name": "a", "macs": 25, "params": 5}],
        "assignment": {"a": ["int2", "int8"]},
    }
    kept, out = kept_layers(record)
    assert (kept.share, kept.weight) == (0.25, "int2")
    assert kept.text == "a\nmacs 25 of 100\nparams 5 of 10\nint2 / int8"
    assert (out.share, out.weight) == (0, None)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a short search of architecture."""
    from eval.eval_run import main

    folder = tmp_path_factory.mktemp("searched")
    flags = (
        "--task digits --model convnet --from_scratch --max_steps 8 --search --architecture_space resnet --quiet "
        "--width_choices 0.25,1 --cost_type compute --target_bits 2 --search_space 2,4 --report_to none "
        "--max_train_samples 64"
    )
    assert main([*flags.split(), "--output_root_dir", str(folder)]) == 0
    return folder


def test_a_report_draws_the_architecture_of_a_run(searched, tmp_path):
    from eval.eval_parse import main

    assert main([str(searched), "--output_dir", str(tmp_path), "--html", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "architecture.png").stat().st_size > 1000
    (record,) = (json.loads(path.read_text()) for path in searched.rglob("result.json"))
    assert [layer.name for layer in kept_layers(record)] == [layer["name"] for layer in record["whole_layers"]]
    assert "operations of the layer that are left" in (tmp_path / "report.html").read_text()
