"""`--rounding`: whole runs, one budget and several, before training and without."""

import json

import pytest
import torch

from eval.config.parser import parse
from eval.eval_run import run
from eval.run.plan import make_plan
from eval.run.trainer import make_trainer
from eval.saved_model import load_model
from quant.convert import get_formats
from quant.errors import UserError
from quant.quant_module import QuantModule

BASE = "--task digits --model convnet --train_batch_size 32 --max_train_samples 96 --max_eval_samples 64"
GPTQ = "--rounding gptq --rounding_samples 64"


def config(folder, flags):
    return parse(f"{BASE} --report_to none --quiet --output_root_dir {folder} {flags}".split())


def on_grid(modules):
    return all(torch.equal(m.weight_quantizer(m.weight), m.weight) for m in modules.values())


@pytest.mark.parametrize("quantizer", ["lsq", "fixed"])
def test_a_run_and_its_saved_model(tmp_path, quantizer):
    flags = f"--weight_bits 3 --activation_bits 8 --max_steps 0 --quantizer {quantizer}"
    plain = run(config(tmp_path, flags + " --run_id nearest"))
    settings = config(tmp_path, f"{flags} {GPTQ}")
    record = run(settings)
    assert record["status"] == "finished" and record["steps"] == 0
    assert record["metrics"]["validation"]["loss"] != plain["metrics"]["validation"]["loss"]
    model = load_model(settings.run_folder)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    assert on_grid(modules) and {str(formats[0]) for formats in get_formats(modules).values()} == {"int3"}
    plan = make_plan(settings)
    validation = plan.prepared.validation["validation"]
    batch = plan.prepared.data_collator([validation[i] for i in range(len(validation))])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    assert loss.item() == pytest.approx(record["metrics"]["validation"]["loss"], rel=1e-5)


def test_each_budget_is_rounded_from_the_float_weights(tmp_path):
    flags = f"--method measured --search_space 2,4,8 --max_steps 0 {GPTQ}"
    several = config(tmp_path, f"{flags} --target_bits 3,5 --run_id both")
    run(several)
    for bits, folder in ((3, several.run_folder / "3b"), (5, several.run_folder)):
        together = json.loads((folder / "result.json").read_text())
        alone = run(config(tmp_path, f"{flags} --target_bits {bits} --run_id only{bits}"))
        assert together["assignment"] == alone["assignment"]
        assert together["metrics"] == alone["metrics"]


@pytest.mark.parametrize(
    "flags", ["--bits 4 --max_steps 2", "--search --search_space 2,4,8 --target_bits 4 --max_steps 8"]
)
def test_training_starts_from_rounded_weights(tmp_path, flags):
    trainer, modules, _ = make_trainer(make_plan(config(tmp_path, f"{flags} {GPTQ}")))
    trainer.prepare()
    chosen = trainer.assignment or trainer.space.assignment(trainer.target.search.best())
    assert get_formats(modules) == chosen and on_grid(modules)
    record = run(config(tmp_path, f"{flags} {GPTQ}"))
    assert record["status"] == "finished"


def test_a_format_without_neighbours_to_choose_from_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--rounding adaround contradicts nvfp4: .* take gptq or nearest"):
        config(tmp_path, "--weight_bits nvfp4 --max_steps 0 --rounding adaround")
    with pytest.raises(UserError, match="--rounding adaround contradicts mxfp4"):
        config(tmp_path, "--search --search_space int4,mxfp4 --rounding adaround")
