"""A search with groups of output channels: record, saved model, packed and ONNX files name and hold each group."""

import json

import numpy as np
import pytest

from tests.journeys.conftest import record_of

RUN = (
    "python eval/eval_run.py --task digits --model convnet --from_scratch --search --channel_groups 2 --device cpu "
    "--search_space 4,8 --target_bits 5.5 --max_steps 16 --max_train_samples 300 --train_batch_size 32 "
    "--learning_rate 1e-2 --report_to none --quiet"
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, command):
    root = tmp_path_factory.mktemp("channels")
    command(f"{RUN} --output_root_dir {root} --run_id own")
    return root / "digits" / "default" / "own"


def test_every_file_of_the_run_predicts_alike_and_names_the_groups(searched, command):
    import torch

    from eval import load_model, load_packed
    from eval.export.finished_run import finished_run
    from quant.convert import get_formats

    record = record_of(searched)
    mixed = [name for name, (weight, _) in record["assignment"].items() if "+" in weight]
    assert mixed and record["cost"] <= record["cost_target"]
    assert record["channel_groups"] == dict.fromkeys(record["assignment"], 2)
    shown = command(f"python eval/eval_parse.py {searched.parent}")
    assert "own" in shown.out or "search" in shown.out

    model = load_model(searched)
    modules = {name: model.get_submodule(name) for name in record["assignment"]}
    assert {n: [str(f) for f in pair] for n, pair in get_formats(modules).items()} == record["assignment"]
    answers = json.loads((searched / "predictions.json").read_text())["validation"]["predicted"]
    rows = finished_run(searched).plan.prepared.validation["validation"]
    images = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        logits = model(pixel_values=images).logits
        for form in ("packed", "onnx"):
            command(f"python -m eval.export {searched} --format {form} --no_evaluate")
        packed = load_packed(searched / "export" / "packed")(pixel_values=images).logits
    assert packed.argmax(1).tolist() == logits.argmax(1).tolist() == answers
    verdicts = json.loads((searched / "export" / "onnx" / "export.json").read_text())["layers"]
    assert all("int8+int4" in json.dumps(verdicts[name]) for name in mixed)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(searched / "export" / "onnx" / "model.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    # Sums of float32 in another order: an image whose two best classes are as good as equal may turn over.
    assert (made.argmax(1) != np.array(answers)).sum() <= 1


def test_formats_of_one_kind_a_layer_cannot_hold_it(searched, command):
    ended = command(f"python -m eval.export {searched} --format torchao", code=2)
    assert ended.err.strip().count("\n") == 0 and "--channel_groups has chosen several" in ended.err
