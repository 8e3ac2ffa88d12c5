"""Ten exports, judged by a script that imports nothing of the project: bits, sizes, engine, accuracy.

    python -m benchmarks.verdicts FOLDER

Makes a decoder and a classifier of texts (tiny, from configuration, with a tokenizer trained here), and a network for
images, in FOLDER; runs and exports each by the commands that users type. Then reads every `export.json` and
recomputes, with numpy, safetensors, onnx, gguf, ONNX Runtime and transformers: the bits of each layer's weight in the
file, the size of the file, the cost, and the metric of the validation data by the engine. Differences are printed, and
the exit code is 1 if there is one. Exports whose packages are missing are left out, which is said.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "big", "small", "red", "hill", "tree", "river"]
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
COMMON = "--device cpu --compile off --save_strategy no --report_to none --quiet --calibration_samples 16"
RUNS = {
    "lm": "--task lm --data_dir {folder}/lm --model_path {folder}/lm/model --weight_bits int4g32 --max_length 32"
    " --max_steps 20 --train_batch_size 8 --learning_rate 1e-3",
    "reviews": "--task {folder}/reviews --model_path {folder}/reviews/model --weight_bits 8 --max_length 32"
    " --max_steps 40 --train_batch_size 16 --learning_rate 2e-3",
    "photos": "--task {folder}/photos --model timm:test_resnet --from_scratch --image_size 16 --bits 8 --max_steps 40"
    " --train_batch_size 8 --learning_rate 1e-2",
}
EXPORTS = {
    "lm": ["packed", "onnx", "torchao", "compressed-tensors", "gguf"],
    "reviews": ["packed", "onnx", "torchao", "compressed-tensors"],
    "photos": ["onnx"],
}
PACKAGES = {"onnx": "onnxruntime", "torchao": "torchao", "compressed-tensors": "compressed_tensors", "gguf": "gguf"}
MIB = 2**20


def write_data(folder: Path) -> None:
    """Write data and models for the three runs."""
    from PIL import Image
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) + " ." for _ in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0], pad_token=special[1]
    )
    torch.manual_seed(0)
    ends = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    llama = transformers.LlamaConfig(**SHAPE, **ends, num_key_value_heads=2, max_position_embeddings=64)
    shape: dict[str, Any] = SHAPE | {"vocab_size": len(words), "max_position_embeddings": 64, "num_labels": 2}
    bert = transformers.BertConfig(**shape)
    made = {
        "lm": transformers.AutoModelForCausalLM.from_config(llama),
        "reviews": transformers.AutoModelForSequenceClassification.from_config(bert),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name / "model")
        words.save_pretrained(folder / name / "model")
    for split, part in (("train", texts[:240]), ("validation", texts[240:])):
        (folder / f"lm/{split}.txt").write_text("\n".join(part))
        rows = ["text,label", *(f"{text},{'praise' if 'cat' in text else 'scorn'}" for text in part)]
        (folder / f"reviews/{split}.csv").write_text("\n".join(rows))
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for number, name in enumerate(("cat", "dog", "eel")):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 120, (20, 20, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")


def command(line: str) -> None:
    """Run a command of the project, as a user types it."""
    print("$ python", line, flush=True)
    subprocess.run([sys.executable, *shlex.split(line)], check=True, stdout=subprocess.DEVNULL)


def make(folder: Path) -> list[tuple[str, Path, Path]]:
    """Make runs and exports; return (task, folder of the run, folder of the export) of each."""
    if not (folder / "photos").exists():
        write_data(folder)
    made = []
    for task, flags in RUNS.items():
        out = folder / "output" / task
        if not list(out.glob("**/result.json")):
            command(f"eval/eval_run.py {flags.format(folder=folder)} {COMMON} --output_root_dir {out}")
        run = next(out.glob("**/result.json")).parent
        for kind in EXPORTS[task]:
            if kind in PACKAGES and find_spec(PACKAGES[kind]) is None:
                print(f"left out, {PACKAGES[kind]} is missing: {task} {kind}")
                continue
            if not (run / "export" / kind).exists():
                command(f"-m eval.export {run} --format {kind}")
            made.append((task, run, run / "export" / kind))
    return made


def codes_of(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Unpack two's complement codes of a packed file."""
    bits = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    codes = bits @ (1 << np.arange(width))
    return codes - (codes >> (width - 1) << width)


def read_packed(path: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return bits per weight of each layer, and all tensors with the values of the codes."""
    with safe_open(str(path), "np") as file:
        layers = json.loads(file.metadata()["packed"])["description"]["layers"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = json.loads(file.metadata()["packed"])["description"]["tied"]
    bits, values = {}, {}
    for name, layer in layers.items():
        shape, own = (
            layer["shape"],
            {k: tensors.pop(f"{name}.weight.{k}", None) for k in ("codes", "scale", "group_scales")},
        )
        assert own["codes"] is not None
        size = math.prod(shape)
        bytes_ = own["codes"].nbytes + (0 if own["group_scales"] is None else own["group_scales"].nbytes)
        bits[name] = bytes_ * 8 / size
        width = own["codes"].nbytes * 8 // size
        codes = codes_of(own["codes"], width, size).reshape(shape).astype(np.float32)
        if own["group_scales"] is None:
            whole = codes * own["scale"].reshape(-1, 1)
        else:
            scale = own["group_scales"].astype(np.float32).reshape(shape[0], -1)
            whole = codes * np.repeat(scale, shape[1] // scale.shape[1], axis=1)
        values[f"{name}.weight"] = torch.from_numpy(whole)
    values |= {name: torch.from_numpy(x) for name, x in tensors.items() if ".input." not in name}
    return bits, values | {alias: values[name] for alias, name in tied.items()}


def bits_in_onnx(path: Path) -> dict[str, float]:
    """Return bits per weight of each layer, with the scales of groups."""
    import onnx

    width = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "FLOAT": 32, "FLOAT16": 16}
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    bits = {}
    for name, tensor in held.items():
        if not name.endswith(".weight.codes"):
            continue
        size = width.get(onnx.TensorProto.DataType.Name(tensor.data_type), 0) * math.prod(tensor.dims)
        scales = [f"{name.removesuffix('codes')}scale{end}" for end in ("", ".half")]
        scale = next((held[scale] for scale in scales if scale in held), None)
        if scale is not None and len(scale.dims) > 1 and min(scale.dims) > 1:  # of groups, not of channels
            size += width[onnx.TensorProto.DataType.Name(scale.data_type)] * math.prod(scale.dims)
        bits[name.removesuffix(".weight.codes")] = size / math.prod(tensor.dims)
    return bits


def bits_in_compressed(folder: Path) -> dict[str, float]:
    """Return bits per weight of each layer, with the scales of groups in fp16."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = {}
    for group in config["config_groups"].values():
        size = group["weights"].get("group_size")
        for name in group["targets"]:
            bits[name] = group["weights"]["num_bits"] + (16 / size if size else 0)
    return bits


def bits_in_gguf(path: Path, layers: dict[str, Any], blocks: int) -> dict[str, float]:
    """Return bits per weight of each layer."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, blocks)
    found = {tensor.name: tensor.n_bytes * 8 / tensor.n_elements for tensor in reader.tensors}
    return {name: found[f"{names.get_name(name)}.weight"] for name in layers}


def model_of(task: str, folder: Path, kind: str) -> Any:
    """Load the model of a text export with transformers."""
    cls = transformers.AutoModelForCausalLM if task == "lm" else transformers.AutoModelForSequenceClassification
    if kind == "gguf":
        config = transformers.AutoConfig.from_pretrained(folder)
        return cls.from_pretrained(folder, gguf_file="model.gguf", config=config, dtype=torch.float32).eval()
    if kind == "compressed-tensors":
        return cls.from_pretrained(folder).eval()
    model = cls.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    _, values = read_packed(
        folder / "model.safetensors"
    )  # weights alone are quantized, so that a float model runs them
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected and all("position_ids" in name or "inv_freq" in name for name in missing), (
        missing,
        unexpected,
    )
    return model


def engine(task: str, folder: Path, kind: str) -> Any:
    """Return a function of the inputs (numpy arrays by name) that returns logits by the export's engine."""
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        names = [entry.name for entry in session.get_inputs()]
        return lambda inputs: session.run(["logits"], {name: inputs[name] for name in names})[0]
    model = model_of(task, folder, kind)

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.numpy()

    return run


def metric(task: str, data: Path, folder: Path, logits: Any, inputs: dict[str, Any]) -> float:
    """Return the accuracy, or the perplexity of the language model, on the validation data."""
    if task == "photos":
        right = []
        for place in sorted((data / "val").glob("*/*.png")):
            right.append(inputs["classes"][int(logits({"pixel_values": pixels(place, inputs["pixels"])})[0].argmax())])
            right[-1] = right[-1] == place.parent.name
        return float(np.mean(right))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if task == "reviews":
        right = []
        for line in (data / "validation.csv").read_text().splitlines()[1:]:
            text, label = line.rsplit(",", 1)
            row = tokenizer(text, truncation=True, max_length=inputs["max_length"], return_tensors="np")
            right.append(inputs["classes"][int(logits(dict(row))[0].argmax())] == label)
        return float(np.mean(right))
    tokens = np.asarray(tokenizer((data / "validation.txt").read_text() + "\n")["input_ids"])
    losses = []
    for start in range(0, len(tokens), inputs["max_length"]):
        block = tokens[None, start : start + inputs["max_length"]]
        scores = torch.from_numpy(logits({"input_ids": block, "attention_mask": np.ones_like(block)}))[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, torch.from_numpy(block[0, 1:]), reduction="none"))
    return math.exp(torch.cat(losses).mean())


def pixels(path: Path, how: dict[str, Any]) -> np.ndarray:
    """Prepare an image as the export says."""
    from PIL import Image

    assert how["window"] == how["size"]
    start = (how["side"] - how["window"]) // 2
    image = Image.open(path).convert("RGB").resize((how["side"], how["side"]), how["resample"])  # all are squares
    x = np.asarray(image, np.float32)[start : start + how["window"], start : start + how["window"]] / 255
    return np.ascontiguousarray(((x - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)[None])


def check(task: str, run: Path, folder: Path, data: Path) -> tuple[str, list[str]]:
    """Recompute what a verdict says; return a row of the table, and the differences."""
    verdict = json.loads((folder / "export.json").read_text())
    record = json.loads((run / "result.json").read_text())
    kind, layers = verdict["format"], verdict["layers"]
    file = next(place for suffix in ("onnx", "gguf", "safetensors") for place in folder.glob(f"model.{suffix}"))
    wrong = []
    if kind in ("packed", "torchao"):
        bits = read_packed(file)[0]
    elif kind == "onnx":
        bits = bits_in_onnx(file)
    elif kind == "gguf":
        bits = bits_in_gguf(file, layers, SHAPE["num_hidden_layers"])
    else:
        bits = bits_in_compressed(folder)
    for name, layer in layers.items():
        if not math.isclose(bits.get(name, math.nan), layer["bits"][0], rel_tol=1e-9):
            wrong.append(f"{name}: {layer['bits'][0]} bits said, {bits.get(name)} found")
    if verdict["size"]["file_bytes"] != file.stat().st_size:
        wrong.append(f"size: {verdict['size']['file_bytes']} said, {file.stat().st_size} found")
    params = {layer["name"]: layer["params"] for layer in record["layers"]}
    memory = sum(layer["bits"][0] * params[name] for name, layer in layers.items()) / 8 / MIB
    if verdict["cost"]["type"] == "memory" and not math.isclose(memory, verdict["cost"]["exported"], rel_tol=1e-6):
        wrong.append(f"cost: {verdict['cost']['exported']} said, {memory} found")
    found = metric(task, data, folder, engine(task, folder, kind), verdict["inputs"])
    name = "perplexity" if task == "lm" else "accuracy"
    said = verdict["metrics"]["exported"]["validation"][name]
    if not math.isclose(found, said, rel_tol=2e-3):
        wrong.append(f"{name}: {said} said, {found} found")
    mean = sum(bits.get(name, 0) * params[name] for name in layers) / sum(params[name] for name in layers)
    size = f"{file.stat().st_size:,}"
    row = f"| {task} | {kind} | {mean:.3f} | {size} | {name} {found:.5g} ({said:.5g} said) | {len(wrong)} |"
    return row, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows, wrong = [], []
    for task, run, export in make(folder):
        row, differences = check(task, run, export, folder / task)
        rows.append(row)
        wrong += [f"{task} {export.name}: {line}" for line in differences]
    print(
        "| task | export | bits a weight found | bytes found | metric found | differences |",
        "|---|---|---|---|---|---|",
        *rows,
        sep="\n",
    )
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
