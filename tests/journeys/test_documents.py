"""Runs the command lines, Python blocks and notebooks of README and docs, and each file of configs/.

They run in a folder that holds what the documents name: DATA, FINE_TUNED, RUN_DIR, RUN_OF_BUDGETS, resnet20-cifar10.
Only sizes and places are changed: FEW steps and rows, the first of several seeds, a local folder for what would come
from the Hub, SMALLER models. The runs of a launch follow each other in one process; other journeys start the launcher
itself.
NOT_RUN lists what does not run here, with the reason.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents import ROOT, Block, Line, blocks, notebooks, shell_lines
from tests.journeys.conftest import environment

NOT_RUN = {
    "make": "test_demo.py, and .ci/run",
    "source": "a shell's own",
    "pip": "test_installed.py",
    "tensorboard": "goes on until it is stopped",
    "#!/bin/bash": "of a cluster",
    **dict.fromkeys(
        ("head=$(scontrol", "ip=$(srun", "srun", "#SBATCH"), "of a cluster: its commands' flags are checked"
    ),
}
OWN_JOURNEY = {"docs/own-data.md": "test_own_data*.py"}
"""documents whose lines run in another test"""
OWN_FOLDER = "reviews"
"""a user's own table, as the quickstart names it"""
FEW = "--max_steps 6 --max_train_samples 32 --max_eval_samples 16 --train_batch_size 8 --eval_batch_size 8"
HERE = "--device cpu --report_to none --save_strategy no --quiet"
SMALLER = {
    "resnet50": "--model resnet18 --image_size 32 --policy_prior none",
    "HuggingFaceTB/SmolLM2-135M": "--model CONFIGS/llama --max_length 32",
}
MODELS = {"bert": "--model bert-tiny", "roberta": "--model CONFIGS/roberta", "bart": "--model CONFIGS/bart"}
"""model of a configuration -> the smallest of its family, from scratch"""
READY = {
    "resnet20-cifar10": "--task cifar10 --data_dir DATA/cifar10 --model resnet20 --from_scratch --method float",
    "FINE_TUNED": "--task mrpc --data_dir DATA/mrpc --model bert-tiny --from_scratch --method float",
    "RUN_DIR": "--task digits --model convnet --from_scratch --bits 8",
    "RUN_OF_BUDGETS": "--task digits --model convnet --from_scratch --search --search_space 2,8 --target_bits 3,3.5,5",
}
"""where the documents expect a run or a model -> the flags of the run that makes it"""
RUNS = ("RUN_DIR", "RUN_OF_BUDGETS")
"""those that are the folders of runs, not models that one has saved"""
REPORTS = ("eval_parse.py", "mpq-report")
MODULES = {"eval.export": "eval.export.__main__"}
RUNNER = """
import importlib, json, sys
from pathlib import Path
from eval.eval_run import run
from eval.launch.grid import expand
from eval.launch.state import read_launch
from quant.errors import UserError
for name, module, words in json.load(open(sys.argv[1])):
    print("$", name, module, *words, flush=True)
    try:
        if module == "launch":
            for one in expand(read_launch(words)):
                record = run(one)
                assert record["status"] == "finished", record["reason"]
        elif module == "published":
            (Path(words[0]) / "quantization.json").unlink()
        else:
            assert importlib.import_module(module).main(words) == 0
    except (UserError, AssertionError) as error:
        sys.exit(f"{name}: {error}")
print("all of them", flush=True)
"""


def table(path: Path, *columns: str) -> None:
    """Write a csv file of a few rows whose texts determine their class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "label"])
        for row in range(40):
            writer.writerow([*(f"{('red', 'blue')[row % 2]} house {row % 7}" for _ in columns), row % 2])


def images(folder: Path, classes: list[str]) -> None:
    from PIL import Image

    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        for place, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (20 * place, 30 * number, 90)).save(folder / split / name / f"{number}.png")


def answers(folder: Path) -> None:
    """Write questions with answers, and texts with summaries."""
    (folder / "squad").mkdir()
    (folder / "cnn_dailymail").mkdir()
    context = "Ann went to Paris by train ."
    found = {"text": ["Paris"], "answer_start": [12]}
    asked = [{"id": str(i), "question": "Where did Ann go ?", "context": context, "answers": found} for i in range(12)]
    told = [{"article": context, "highlights": "Ann went to Paris"} for _ in range(12)]
    for task, rows in (("squad", asked), ("cnn_dailymail", told)):
        for split in ("train", "validation"):
            (folder / task / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))


def configurations(folder: Path) -> None:
    from transformers import BartConfig, LlamaConfig, RobertaConfig

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaConfig(**sizes, max_position_embeddings=514).save_pretrained(folder / "roberta")
    LlamaConfig(**sizes, max_position_embeddings=64).save_pretrained(folder / "llama")
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sides = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 1024}
    BartConfig(**layers, **sides).save_pretrained(folder / "bart")


def steps(name: str, words: list[str]) -> tuple[str, str, list[str]]:
    """The flags of a run or a launch, with small sizes and local places."""
    kept = [word for word in words if word != "..."]
    value = {flag: kept[at + 1] for at, flag in enumerate(kept[:-1]) if flag.startswith("--")}
    told = yaml.safe_load((ROOT / value["--config"]).read_text()) if "--config" in value else {}
    most = int(value.get("--max_steps", told.get("max_steps", 6)))
    extra = f"{FEW.replace('--max_steps 6', f'--max_steps {min(6, most)}')} {HERE}".split()
    task = value.get("--task", told.get("task"))
    if task not in (None, "digits", OWN_FOLDER) and "--data_dir" not in value:
        extra += ["--data_dir", f"DATA/{task}"]
    if task == "digits" and not any(flag in value for flag in ("--load_model_path", "--model_path")):
        extra += ["--from_scratch"]
    if (model := value.get("--model")) in SMALLER:
        extra += [*SMALLER[model].split(), "--from_scratch"]
    if "--seeds" in value:
        extra += ["--seeds", value["--seeds"].split(",")[0]]
    return name, "launch", [*kept, *extra]


def job(line: Line) -> tuple[str, str, list[str]] | None:
    """(name, module, words) of a documented line; None if it is not run. Fails for a line of an unknown kind."""
    words = list(line.words)
    if words[0].split("=")[0] in NOT_RUN or words[0] in NOT_RUN or "--help" in words:
        return None
    for at, word in enumerate(words):
        if word.endswith(("eval_parallel.py", "eval_run.py", "mpq-search", "mpq-run")):
            if "--resolve" in words:
                return line.name, "eval.eval_run", words[at + 1 :]
            return None if "--ray_address" in words else steps(line.name, words[at + 1 :])
        if word.endswith(REPORTS):
            return line.name, "eval.eval_parse", words[at + 1 :]
        if word == "-m" and words[at + 1].startswith(("eval.", "policy.")):
            return line.name, MODULES.get(words[at + 1], words[at + 1]), words[at + 2 :]
        if word.startswith("mpq-"):
            module = f"eval.{word.removeprefix('mpq-')}"
            return line.name, MODULES.get(module, module), words[at + 1 :]
    pytest.fail(f"{line.name}: {shlex.join(words)}: say in NOT_RUN why this is not run, or run it")


def configured(path: Path) -> tuple[str, str, list[str]]:
    """A short run of a file of configs/, on the smallest model of its family."""
    told = yaml.safe_load(path.read_text())
    few = FEW if told.get("max_steps", 1) else FEW.replace("--max_steps 6", "--max_steps 0")
    extra = (
        f"{MODELS[told['model']]} --from_scratch --data_dir DATA/{told['task']} {few} {HERE} --calibration_samples 8"
    )
    name = str(path.relative_to(ROOT))
    return name, "launch", ["--config", name, *extra.split(), "--max_length", "32", "--run_id", path.stem]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like the root of the repository, with data and models of a user."""
    folder = tmp_path_factory.mktemp("documents")
    for path in ROOT.iterdir():
        if path.name in ("eval_parallel.py", "mpq_commands.py", "configs") or (path / "__init__.py").exists():
            (folder / path.name).symlink_to(path)
    table(folder / "DATA/glue/sst2/train.csv", "sentence")
    table(folder / "DATA/glue/sst2/validation.csv", "sentence")
    for split in ("train", "validation"):
        table(folder / f"DATA/mrpc/{split}.csv", "sentence1", "sentence2")
        table(folder / OWN_FOLDER / f"{split}.csv", "text")
        table(folder / f"DATA/text/{split}.csv", "text")
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    images(folder / "DATA/cifar10", classes)
    images(folder / "DATA/imagenet-1k", ["n01440764", "n01443537"])
    answers(folder / "DATA")
    configurations(folder / "CONFIGS")
    return folder


def python(place: Path, *words: str) -> str:
    """Run Python in `place` and return what it printed; fails with its last lines."""
    seen = environment({"PYTHONPATH": str(place)})
    done = subprocess.run([sys.executable, *words], cwd=place, env=seen, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def lines(place) -> str:
    """What the documented lines printed, run one after the other."""
    jobs = []
    for where, flags in READY.items():
        root = ["--run_id", "ready", "--output_root_dir", f"READY/{where}"]
        saved = [] if where in RUNS else ["--save_model_path", where]
        jobs.append((where, "launch", [*flags.split(), *FEW.split(), *HERE.split(), *root, *saved]))
    for where in RUNS:
        (place / where).symlink_to(place / f"READY/{where}/digits/default/ready")
    jobs.append(("FINE_TUNED", "published", ["FINE_TUNED"]))  # as save_pretrained leaves it, not as a run of ours
    own = tuple(OWN_JOURNEY)
    found = filter(None, (job(line) for line in shell_lines() if not line.name.startswith(own)))
    once: dict[tuple[str, ...], tuple[str, str, list[str]]] = {}
    for name, module, words in found:
        once.setdefault((module, *words), (name, module, words))
    jobs += once.values()
    (place / "jobs.json").write_text(json.dumps(jobs))
    return python(place, "-c", RUNNER, "jobs.json")


def test_every_line_of_the_documents_runs(lines):
    assert lines.strip().endswith("all of them")
    assert lines.count("$ README.md") + lines.count("$ docs/") >= 15


def test_documents_with_a_journey_of_their_own_have_it():
    for document, journey in OWN_JOURNEY.items():
        assert not (ROOT / document).exists() or list((ROOT / "tests" / "journeys").glob(journey)), document


def test_every_configuration_runs(place):
    jobs = [configured(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    (place / "configs.json").write_text(json.dumps(jobs))
    assert python(place, "-c", RUNNER, "configs.json").count("$ configs/") == len(jobs) >= 16


READER = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments
settings = {"per_device_train_batch_size": 64, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no"}
images, digits = load_digits(return_X_y=True)
rows = [{"x": torch.tensor(image / 16).float(), "labels": int(digit)} for image, digit in zip(images, digits)]
train, validation = rows[:1400], rows[1400:]
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)
    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}
"""
"""a reader's own program, reader.py"""
GIVEN = {
    "NLPTrainer(model": (
        "from reader import *\nmodel, arguments = Net(), TrainingArguments('out', max_steps=5, **settings)\n"
        "compute_metrics = lambda told: {'f1': float((told.predictions.argmax(1) == told.label_ids).mean())}"
    ),
    'load_packed("RUN_DIR': "import torch\nimages = torch.rand(2, 1, 8, 8)",
}
"""text of a block -> the lines that define what it takes from the reader's own program"""
EACH = """
import runpy, sys
for name in sys.argv[1:]:
    runpy.run_path(name, run_name="__main__")
"""


def rewritten(block: Block) -> str:
    given = [code for sign, code in GIVEN.items() if sign in block.text]
    return "\n".join(
        [f"print({block.name!r}, flush=True)", *given, re.sub(r"max_steps=\d+", "max_steps=20", block.text)]
    )


def test_every_python_block_and_notebook_runs(place, lines):
    """The blocks of a document run one after the other, as a reader would try them."""
    found = [block for block in blocks("python") if not block.name.startswith(tuple(OWN_JOURNEY))]
    by_document = {block.document: [other for other in found if other.document == block.document] for block in found}
    (place / "reader.py").write_text(READER)
    scripts = {place / f"{document.stem}_blocks.py": own for document, own in by_document.items()}
    for script, own in scripts.items():
        script.write_text("\n\n".join(map(rewritten, own)))
    for notebook, cells in notebooks().items():
        script = place / f"{notebook.stem.replace('-', '_')}_notebook.py"
        script.write_text("\n\n".join([*cells, f"print({notebook.name!r}, 'ran')"]))
        scripts[script] = []
    told = python(place, "-c", EACH, *(script.name for script in scripts))
    assert len(by_document) > 3 and all(block.name in told for block in found)
    assert all(f"{notebook.name} ran" in told for notebook in notebooks())
