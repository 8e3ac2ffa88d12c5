"""Facts about layers: cost shares by hand, and a table of sensitivities that is read or named as damaged."""

import pytest

from benchmarks.synthetic_runs import real_run, write_run
from eval.report.layers import MAX_STRETCHES, cost_shares, formats_by_layer, layer_texts, read_sensitivities
from eval.report.records import DamagedFile, read_run

LAYERS = [{"name": "a", "macs": 100, "params": 10}, {"name": "b", "macs": 50, "params": 30}]


def run_of(folder, **changes):
    assignment = {"a": ["int4", "int8"], "b": ["int8", "int8"]}
    return read_run(write_run(folder, "search", 0, target=0.05, layers=LAYERS, assignment=assignment, **changes))


def test_shares_of_memory_and_compute(tmp_path):
    """Memory: 10 x 4 and 30 x 8 bits. Compute: 100 x 4 x 8 and 50 x 8 x 8."""
    memory = cost_shares(run_of(tmp_path / "m", cost_type="memory", cost_unit="MiB"))
    assert memory == {"a": pytest.approx(40 / 280), "b": pytest.approx(240 / 280)}
    assert cost_shares(run_of(tmp_path / "c")) == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}


def test_a_sensitivity_belongs_to_all_layers_of_its_decision(tmp_path):
    run = run_of(tmp_path)
    run.record["decisions"] = {"both": ["a", "b"]}
    (run.folder / "sensitivity.csv").write_text("decision,fisher int4,fisher int4 error\nboth,0.5,\n")
    found = read_sensitivities(run.folder)
    assert found == {"fisher int4": {"both": (0.5, None)}}
    assert all("sensitivity, fisher int4: 0.5" in text for text in layer_texts(run, found).values())


def test_a_search_leaves_its_sensitivities_in_its_folder():
    folder = real_run("search")
    found = read_sensitivities(folder)
    assert list(found) == ["measured int2", "measured int4", "measured int8"]
    assert all(values.keys() == read_run(folder).record["decisions"].keys() for values in found.values())


@pytest.mark.parametrize("text", ["decision,a\nx,word\n", "decision,a\nx,nan\n", "other,a\nx,1\n", "decision,a\nx\n"])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "sensitivity.csv").write_text(text)
    with pytest.raises(DamagedFile, match=r"sensitivity\.csv: damaged"):
        read_sensitivities(tmp_path)


def test_without_a_table_there_are_no_sensitivities(tmp_path):
    assert not read_sensitivities(tmp_path)


def test_stretches_of_one_format_are_one_line(tmp_path):
    run = run_of(tmp_path)
    run.record["assignment"] = {f"m.{i}": ["int4", "int4"] for i in range(3)} | {"m.last": ["int4", "int8"]}
    assert formats_by_layer(run) == ["0 to 2 (3): int4", "last: int4 / int8"]


def test_a_long_list_of_stretches_is_cut(tmp_path):
    run = run_of(tmp_path)
    run.record["assignment"] = {f"m.{i}": [f"int{2 + i % 2}"] * 2 for i in range(40)}
    lines = formats_by_layer(run)
    assert len(lines) == MAX_STRETCHES and lines[-1] == f"… and {40 - MAX_STRETCHES + 1} more stretches"


def test_shares_of_a_whole_file_leave_room_for_its_scales_and_norms(tmp_path):
    record = {"cost_type": "memory", "cost_unit": "MiB", "cost_scope": "file"}
    alone = cost_shares(run_of(tmp_path / "m", cost_type="memory", cost_unit="MiB"))
    layers = run_of(tmp_path / "s", **record).record
    bits = sum(
        layer["params"] * float(layers["assignment"][layer["name"]][0].removeprefix("int"))
        for layer in layers["layers"]
    )
    whole = cost_shares(run_of(tmp_path / "f", **record, cost=bits / 8 / 2**20 * 1.25))
    assert whole == {name: pytest.approx(share * 0.8) for name, share in alone.items()}
