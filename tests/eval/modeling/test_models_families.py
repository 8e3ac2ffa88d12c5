"""One short search per model family, on small configurations: it meets its budget, and the model loads again."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from eval.config.parser import parse
from eval.eval_run import run, save_result
from eval.models import build_model
from eval.run.plan import make_plan, search_space
from eval.saved_model import load_model
from quant.errors import UserError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "bert": ("words", transformers.BertConfig(**SMALL)),
    "roberta": ("words", transformers.RobertaConfig(**SMALL, max_position_embeddings=34, type_vocab_size=1)),
    "llama": ("words", transformers.LlamaConfig(**SMALL, max_position_embeddings=32)),
    "gpt2": ("words", transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32)),
    "gpt2-lm": ("lm", transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32)),
    "resnet18": ("digits", transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1])),
    "resnet50": (
        "digits",
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 1],
            layer_type="bottleneck",
            downsample_in_bottleneck=True,
        ),
    ),
    "efficientnet-b0": (
        "digits",
        transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, image_size=32),
    ),
    "mobilenetv2": ("digits", transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32)),
    "deit": ("digits", transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)),
    "inception": ("digits", "inceptionv3"),
    "timm": ("digits", "timm:test_efficientnet"),
    "torchvision": ("digits", "torchvision:shufflenet_v2_x0_5"),
    "convnet": ("digits", "convnet"),
}

SEARCH = (
    "--search --search_space 4,8 --target_bits 6 --policy_prior none --max_steps 3 --train_batch_size 4"
    " --eval_batch_size 6 --max_train_samples 40 --max_eval_samples 12 --save_strategy no --report_to none"
    " --device cpu --compile off --quiet"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Two tasks: sentences with a label, and lines of text."""
    folder = tmp_path_factory.mktemp("words")
    rows = [(f"the {who} sees {n} hills", label) for n in range(24) for label, who in enumerate(("cat", "dog"))]
    for name, part in (("train", rows[:40]), ("validation", rows[40:])):
        (folder / "words" / f"{name}.csv").parent.mkdir(exist_ok=True)
        (folder / "words" / f"{name}.csv").write_text("text,label\n" + "\n".join(f"{text},{n}" for text, n in part))
        (folder / "lm" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (folder / "lm" / f"{name}.txt").write_text("\n".join(text for text, _ in part))
    return folder


def settings(family, folder, words, more=""):
    """A short search of a model of the family, on data of its kind."""
    task, model = FAMILIES[family]
    if family == "timm":
        pytest.importorskip("timm")
    if isinstance(model, transformers.PretrainedConfig):
        model.save_pretrained(folder / "model")
        model = str(folder / "model")
    flags = ["--model", model, *([] if family == "convnet" else ["--from_scratch"])]
    flags += {
        "words": ["--task", str(words / "words"), "--max_length", "32"],
        "lm": ["--task", "lm", "--data_dir", str(words / "lm"), "--max_length", "32"],
        "digits": ["--task", "digits", "--image_size", "75" if family == "inception" else "32"],
    }[task]
    if family == "inception":  # 94 layers take long to calibrate and compare
        flags += ["--quantizer", "fixed", "--recipe", "fliqs"]
    return parse([*flags, *f"{SEARCH} {more}".split(), "--output_root_dir", str(folder / "output")])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_ends_in_its_budget_and_loads_again_bit_by_bit(family, tmp_path, words, monkeypatch):
    plans = []
    monkeypatch.setattr("eval.eval_run.save_result", lambda plan, *rest: plans.append(plan) or save_result(plan, *rest))
    config = settings(family, tmp_path, words)
    record = run(config)
    assert record["status"] == "finished" and record["cost"] <= record["cost_target"]

    (plan,) = plans
    trained, reloaded = plan.bundle.model.eval(), load_model(config.run_folder)
    losses = []
    with torch.no_grad():
        for batch in DataLoader(plan.prepared.validation["validation"], 6, collate_fn=plan.prepared.data_collator):
            output = reloaded(**batch)
            assert torch.equal(output.logits, trained(**batch).logits)
            losses.append(output.loss.item() * len(batch["labels"]))
    (metrics,) = record["metrics"].values()
    assert sum(losses) / metrics["n"] == pytest.approx(metrics["loss"], rel=1e-5)


FUSED = {
    "bert": [["query", "key", "value"]] * 2,
    "llama": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2,
    "resnet18": [["convolution"] * 3, ["convolution"] * 2],
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_groups_share_a_decision_that_the_record_names(family, tmp_path, words):
    record = run(settings(family, tmp_path, words, "--fuse_groups"))
    groups = [layers for layers in record["decisions"].values() if len(layers) > 1]
    assert [[layer.rpartition(".")[2] for layer in layers] for layers in groups] == FUSED[family]
    assert sorted(layer for layers in record["decisions"].values() for layer in layers) == sorted(record["assignment"])
    assert all(len({tuple(record["assignment"][layer]) for layer in layers}) == 1 for layers in groups)
    assert record["run_id"].endswith("-search-fused-6b-s42")


def test_fused_groups_widen_the_blocks_of_a_block_search(tmp_path, words):
    plan = make_plan(settings("llama", tmp_path, words, "--block_search --fuse_groups"))
    decisions = search_space(plan).decisions
    assert {d.name: [layer.rpartition(".")[2] for layer in d.layers] for d in decisions} == {
        "model.layers.*.self_attn.q_proj+2": ["q_proj"] * 2 + ["k_proj"] * 2 + ["v_proj"] * 2,
        "model.layers.*.self_attn.o_proj": ["o_proj"] * 2,
        "model.layers.*.mlp.gate_proj+1": ["gate_proj"] * 2 + ["up_proj"] * 2,
        "model.layers.*.mlp.down_proj": ["down_proj"] * 2,
    }


RECOMPUTING = ["bert", "roberta", "llama", "gpt2", "gpt2-lm", "deit", "timm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_recomputed_or_that_is_refused_before_training(family, tmp_path, words):
    config = settings(family, tmp_path, words, "--gradient_checkpointing")
    if family not in RECOMPUTING:
        with pytest.raises(UserError, match=r"--gradient_checkpointing: \w+ has no way to recompute"):
            make_plan(config)
        return
    plan = make_plan(config)
    calls = Counter()
    for name in plan.layers:
        plan.bundle.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    batch = plan.prepared.data_collator([plan.prepared.train[i] for i in range(4)])
    plan.bundle.model.train()(**batch).loss.backward()
    assert max(calls.values()) == 2  # once forward, once more in the backward pass


@pytest.mark.parametrize("family", ["bert", "timm"])
def test_recomputed_activations_change_nothing(family, tmp_path, words):
    config = settings(family, tmp_path, words, "--gradient_checkpointing")
    recomputed = run(config)
    plain = run(config.updated(gradient_checkpointing=False, run_id="plain"))
    assert {name for name in plain if plain[name] != recomputed[name]} <= {"run_id", "wall_seconds"}


def test_momentum_of_batch_norms_built_for_tensorflow_is_corrected(tmp_path):
    FAMILIES["efficientnet-b0"][1].save_pretrained(tmp_path)
    run = SimpleNamespace(task="digits", model=str(tmp_path), from_scratch=True, seed=0)
    bundle = build_model(run, 10)
    momenta = {module.momentum for module in bundle.model.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert max(momenta) <= 0.1 and any("momentum" in note for note in bundle.notes)
