"""`--architecture_space`: what it refuses, what a run writes, and the plain smaller model that it leaves."""

import json

import pytest
import torch
from onnxruntime import InferenceSession
from torch import nn

from cost.profile import profile_model
from eval.config.parser import parse
from eval.eval_run import main
from eval.export.__main__ import main as export
from eval.run.plan import make_plan
from eval.saved_model import load_model
from quant.errors import UserError
from quant.export.onnx.export import export_onnx
from quant.quant_module import QuantModule

SPACE = ["--architecture_space", "resnet"]
SEARCH = ["--task", "digits", "--model", "convnet", "--from_scratch", "--search", "--cost_type", "compute"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--architecture_space", "vgg"], ["--architecture_space", "'vgg'", "mobilenetv2"]),
        ([*SPACE, "--width_choices", "1"], ["--architecture_space resnet", "leaves no choice", "--width_choices 1"]),
        ([*SPACE, "--width_choices", "0.5,1.5"], ["--width_choices 0.5,1.5", "1.5", "(0, 1]"]),
        ([*SPACE, "--width_choices", "0.5,,1"], ["--width_choices", "empty entry"]),
        ([*SPACE, "--width_choices", "half,1"], ["--width_choices half,1", "numbers"]),
        ([*SPACE, "--kernel_choices", "3,5"], ["--kernel_choices 3,5", "--architecture_space resnet", "mobilenetv2"]),
        (["--architecture_space", "mobilenetv2", "--kernel_choices", "3,4"], ["--kernel_choices 3,4", "odd", "4"]),
        ([*SPACE, "--depth_choices", "0,1"], ["--depth_choices 0,1", "at least 1 block"]),
        ([*SPACE, "--engine", "onnxruntime"], ["--engine", "--architecture_space resnet"]),
        ([*SPACE, "--target_bits", "3,4"], ["--target_bits 3,4", "one model"]),
        ([*SPACE, "--search_space", "int4g32,8"], ["--search_space int4g32,8", "int4g32"]),
        ([*SPACE, "--max_drop", "0.1"], ["--max_drop", "--architecture_space resnet"]),
        (["--width_choices", "0.5,1"], ["--width_choices 0.5,1", "--architecture_space"]),
    ],
)
def test_what_a_search_of_architecture_cannot_do_is_one_line(flags, named):
    with pytest.raises(UserError) as error:
        parse([*SEARCH, *flags])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--architecture_space", "mobilenetv2"], ["convnet", "depthwise", "resnet"]),
        (["--architecture_space", "transformer"], ["convnet", "attention", "resnet"]),
        ([*SPACE, "--depth_choices", "1,2"], ["depth 2", "ConvNet", "0"]),
        ([*SPACE, "--target_bits", "0.5"], ["--target_bits 0.5 is", "cost", "to", "GBOPs"]),
        ([*SPACE, "--cost_target", "1e-6"], ["--cost_target 1e-06", "GBOPs"]),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(flags, named):
    with pytest.raises(UserError) as error:
        make_plan(parse([*SEARCH, *flags]))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value


def test_from_scratch_depthwise_kernels_are_the_largest_of_the_choices():
    flags = ["--model", "torchvision:mobilenet_v2", "--image_size", "32", "--width_choices", "1"]
    flags += ["--architecture_space", "mobilenetv2", "--kernel_choices", "3,5"]
    plan = make_plan(parse([*SEARCH, *flags]))
    assert {(d.kind, d.choices) for d in plan.architecture.decisions} == {("kernel", (3, 5))}
    assert len(plan.architecture.decisions) == 17
    profile = {profile.name: profile for profile in plan.profiles}["net.features.1.conv.0.0"]
    assert profile.params == 32 * 25 and profile.positions == 16 * 16


def run(folder, name):
    flags = f"--search_space 2,4,8 --target_bits 2.5 --max_steps 12 --output_root_dir {folder} --run_id {name}".split()
    flags += ["--max_train_samples", "256", "--max_eval_samples", "64", "--report_to", "none", "--quiet"]
    assert main([*SEARCH, *SPACE, *flags, *(["--verify_retrain"] if name == "first" else [])]) == 0
    return folder / "digits" / "default" / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("architecture"), "first")


def test_the_record_holds_the_architecture_and_its_cost(finished):
    record = json.loads((finished / "result.json").read_text())
    assert set(record["architecture_space"]) == set(record["architecture"]) == {f"convs.{n} width" for n in range(4)}
    assert record["architecture_space"]["convs.0 width"] == [8, 12, 16]
    assert record["cost"] <= record["cost_target"] and record["cost_range"][0] <= record["cost"]
    macs = {layer["name"]: layer["macs"] for layer in record["layers"]}
    whole = {layer["name"]: layer["macs"] for layer in record["whole_layers"]}
    first = int(record["architecture"]["convs.0 width"].split()[0])
    assert macs["convs.0"] * 16 == whole["convs.0"] * first and macs.keys() == whole.keys()
    assert record["retrained"]["validation"]["n"] == record["metrics"]["validation"]["n"]


def test_the_model_is_a_plain_smaller_one(finished):
    record, model = json.loads((finished / "result.json").read_text()), load_model(finished)
    assert not [module for module in model.modules() if "Elastic" in type(module).__name__]
    sizes = {layer["name"]: layer["macs"] for layer in record["layers"]}
    x = {"pixel_values": torch.rand(1, 1, 8, 8)}
    assert {profile.name: profile.macs for profile in profile_model(model, x)} == sizes
    assert all(m.weight.shape[0] == m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def test_a_packed_export_holds_the_smaller_model(finished, tmp_path):
    assert export([str(finished), "--format", "packed", "--output_dir", str(tmp_path / "packed")]) == 0
    verdict = json.loads((tmp_path / "packed" / "export.json").read_text())
    record = json.loads((finished / "result.json").read_text())
    assert verdict["metrics"]["exported"] == record["metrics"]
    assert verdict["cost"]["exported"] == pytest.approx(record["cost"], rel=1e-12)
    card = (tmp_path / "packed" / "README.md").read_text()
    for name, choice in record["architecture"].items():
        assert f"| `{name.rsplit(' ', 1)[0]}` | {choice} |" in card


def test_an_onnx_file_computes_the_smaller_model(finished, tmp_path):
    model, x = load_model(finished), torch.rand(2, 1, 8, 8)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    export_onnx(tmp_path / "model.onnx", model, modules, {"pixel_values": x})
    session = InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pixel_values=x)["logits"].detach(), rtol=1e-2, atol=1e-2)


def test_the_same_seed_gives_the_same_record(finished, tmp_path):
    records = [json.loads((folder / "result.json").read_text()) for folder in (finished, run(tmp_path, "second"))]
    for key in ("architecture", "assignment", "cost", "metrics", "contest"):
        assert records[0][key] == records[1][key], key


def test_a_transformer_loses_heads_features_and_blocks(tmp_path):
    sizes = "hidden_size=32 num_hidden_layers=2 num_attention_heads=4 intermediate_size=48 max_position_embeddings=32"
    settings = {name: int(value) for name, value in (pair.split("=") for pair in sizes.split())}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps({"model_type": "bert", **settings}))
    for split in ("train", "validation"):
        rows = [f"{('red', 'blue')[row % 2]} house {row % 7},{row % 2}" for row in range(64)]
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    flags = f"--task {tmp_path}/texts --model {tmp_path}/net --from_scratch --search --search_space 4,8".split()
    flags += f"--cost_type compute --target_bits 3 --max_steps 8 --max_length 16 --output_root_dir {tmp_path}".split()
    flags += ["--architecture_space", "transformer", "--depth_choices", "1", "--run_id", "small"]
    assert main([*flags, "--report_to", "none", "--quiet", "--sensitivity_examples", "16"]) == 0
    folder = tmp_path / "texts" / "default" / "small"
    record = json.loads((folder / "result.json").read_text())
    kinds = {name.rsplit(" ", 1)[1] for name in record["architecture"]}
    assert kinds == {"width", "heads", "depth"} and record["cost"] <= record["cost_target"]
    assert "one size for all layers" in record["exports"]["compressed-tensors"]
    assert "one size for all layers" in record["engines"]["vllm"]["obstacle"]
    model, tokens = load_model(folder), {"input_ids": torch.tensor([[1, 2, 3]])}
    layers = [layer["name"] for layer in record["layers"]]
    found = {p.name: p.params for p in profile_model(model, tokens, layers)}
    assert found == {layer["name"]: layer["params"] for layer in record["layers"]}
    with pytest.raises(UserError, match="--architecture_space has chosen"):
        export([str(folder), "--format", "compressed-tensors", "--output_dir", str(tmp_path / "ct")])
