"""One short search per model family, on small configurations: it ends within its budget, is saved, and loads again."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from eval.eval_run import run
from eval.flags import parse
from eval.models import build_model
from eval.saved_model import load_model
from eval.tasks import load_task, prepare

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "bert": ("words", transformers.BertConfig(**SMALL)),
    "roberta": ("words", transformers.RobertaConfig(**SMALL, max_position_embeddings=34, type_vocab_size=1)),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_ends_in_its_budget_and_loads_again(family, tmp_path, words):
    task, model = FAMILIES[family]
    if family == "timm":
        pytest.importorskip("timm")
    if isinstance(model, transformers.PretrainedConfig):
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    flags = ["--model", model, *([] if family == "convnet" else ["--from_scratch"])]
    flags += {
        "words": ["--task", str(words / "words"), "--max_length", "32"],
        "lm": ["--task", "lm", "--data_dir", str(words / "lm"), "--max_length", "32"],
        "digits": ["--task", "digits", "--image_size", "75" if family == "inception" else "32"],
    }[task]
    flags += SEARCH.split()
    flags += ["--quantizer", "fixed"] if family == "inception" else []  # 94 layers take their time to calibrate
    flags += ["--output_root_dir", str(tmp_path / "output")]
    config = parse(flags)
    record = run(config)
    assert record["status"] == "finished" and record["cost"] <= record["cost_target"]

    data = load_task(config)
    corpus = data.corpus() if task != "digits" else None
    prepared = prepare(data, build_model(config, data.num_labels, corpus), config)
    reloaded = load_model(config.run_folder)
    losses = []
    with torch.no_grad():
        for batch in DataLoader(prepared.validation["validation"], 6, collate_fn=prepared.data_collator):
            output = reloaded(**batch)
            losses.append(output.loss.item() * len(batch["labels"]))
    (metrics,) = record["metrics"].values()
    assert sum(losses) / metrics["n"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_momentum_of_batch_norms_built_for_tensorflow_is_corrected(tmp_path):
    FAMILIES["efficientnet-b0"][1].save_pretrained(tmp_path)
    run = SimpleNamespace(task="digits", model=str(tmp_path), from_scratch=True, seed=0)
    bundle = build_model(run, 10)
    momenta = {module.momentum for module in bundle.model.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert max(momenta) <= 0.1 and any("momentum" in note for note in bundle.notes)
