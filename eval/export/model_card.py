"""The model card of an export: cost, metrics, inputs and outputs, formats, and a program that runs the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.export.finished_run import FinishedRun
    from eval.export.formats import Usage
    from eval.modeling.bundle import Pixels
    from eval.modeling.inputs import ModelInputs

FILTERS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}
"""Number of a resizing filter in PIL -> its name."""
SPANS = 'session.run(["start_logits", "end_logits"], feed)'
"""Call of an ONNX file that answers questions."""
HERE = "."
"""The folder of a card, in its program: an export may be moved."""
IMAGES = "It reads images with the packages pillow and numpy (`pip install pillow numpy`). "
MAX_CLASSES = 1000
"""Maximum number of classes listed by name; export.json lists all of them."""


def model_card(run: FinishedRun, verdict: dict[str, Any], usage: Usage) -> str:
    """Write the README.md of an export.

    Args:
        run: The exported run.
        verdict: Content of export.json.
        usage: How to run the export.

    Returns:
        The card in Markdown.
    """
    record = run.record
    layers = verdict["layers"].values()
    pairs = Counter(" / ".join(layer["exported"]) for layer in layers)
    widened = [f"- `{name}`: {'; '.join(layer['why'])}" for name, layer in verdict["layers"].items() if layer["why"]]
    searched = "" if record["search_space"] is None else f" over {', '.join(record['search_space'])}"
    lines = [
        f"# {record['model']} on {record['task']}, {verdict['format']}",
        "",
        f"Quantized by a {record['method']} run{searched} (seed {record['seed']}, run `{record['run_id']}`).",
        "",
        *(f"- {line}" for line in summary(verdict)),
        "",
        "## What goes in, what comes out",
        "",
        *(f"- {line}" for line in describe_inputs(run.inputs)),
        "",
        "## Formats",
        "",
        "| weights / activations | layers |",
        "|---|---|",
        *(f"| {pair} | {count} |" for pair, count in pairs.most_common()),
        "",
        "Every layer stands in `export.json`." + (" Not as chosen:" if widened else " All are as chosen."),
        *(["", *widened] if widened else []),
        *describe_architecture(record.get("architecture") or {}),
        "",
        "## How to run it",
        "",
        f"{usage.where} {IMAGES if run.inputs.pixels else ''}Run it in this folder.",
        "",
        "```python",
        *program(run.inputs, usage, type(run.model).__name__),
        "```",
    ]
    return "\n".join(lines) + "\n"


def describe_architecture(chosen: Mapping[str, str]) -> list[str]:
    """Return a section about the sizes that a search of architecture has chosen; nothing where there was none.

    Args:
        chosen: Decision, such as 'layer1.0.conv1 width' -> choice, such as '12 of 16 channels'.
    """
    if not chosen:
        return []
    rows = (f"| `{name.rsplit(' ', 1)[0]}` | {choice} |" for name, choice in chosen.items())
    return ["", "## Architecture", "", "| layer or first block of a stage | kept |", "|---|---|", *rows]


def describe_inputs(inputs: ModelInputs) -> list[str]:
    """Describe the inputs and outputs of the model, one line each."""
    lines = []
    if pixels := inputs.pixels:
        colours = "grey" if pixels.channels == 1 else "RGB"
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (pixels.mean, pixels.std))
        cut = "" if pixels.window == pixels.side else f", the middle {pixels.window} x {pixels.window} of that"
        grown = "" if pixels.size == pixels.window else f", enlarged to {pixels.size} x {pixels.size} (bilinear)"
        filter = FILTERS.get(pixels.resample, str(pixels.resample))
        lines += [
            f"`pixel_values` (N, {pixels.channels}, {pixels.size}, {pixels.size}): {colours}, the shorter side resized "
            f"to {pixels.side} ({filter}), the middle {pixels.side} x {pixels.side}{cut}, normalised{grown}",
            f"size {pixels.size}, mean {mean}, std {std}: (x / 255 - mean) / std",
        ]
    else:
        columns = " and ".join(f"`{column}`" for column in inputs.columns)
        lines.append(f"text ({columns}) as tokens of the tokenizer in this folder, at most {inputs.max_length}")
    if inputs.classes:
        shown = [f"{number} `{name}`" for number, name in enumerate(inputs.classes[:MAX_CLASSES])]
        more = ", ..." if len(inputs.classes) > MAX_CLASSES else ""
        lines.append(f"logits (N, {len(inputs.classes)}) of the classes {', '.join(shown)}{more}")
    elif inputs.regression:
        lines.append("a number, `logits` (N, 1)")
    return lines


def program(inputs: ModelInputs, usage: Usage, architecture: str) -> list[str]:
    """Return the lines of a Python program that loads the export and runs it on an input.

    Args:
        inputs: Inputs of the model.
        usage: How to load and call the export.
        architecture: Class name of the model.
    """
    loading = usage.load.format(folder=HERE, architecture=architecture)
    imports = [line.format(architecture=architecture) for line in usage.imports]
    if inputs.pixels is not None:
        imports += ["import sys", "import numpy as np", "from PIL import Image, ImageOps"]
        imports += ["import torch"] if inputs.pixels.size != inputs.pixels.window else []
        body = image_program(inputs, usage)
    else:
        imports += ["from transformers import AutoTokenizer"]
        body = [f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")', *text_program(inputs, usage)]
    return [*group_imports(imports), "", *loading.splitlines(), *body]


def group_imports(imports: Sequence[str]) -> list[str]:
    """Sort distinct import lines into groups: standard library, third-party packages, this project."""
    lines = sorted(dict.fromkeys(imports), key=lambda line: line.split()[1].lower())
    groups = [[], [], []]  # type: list[list[str]]
    for line in lines:
        module = line.split()[1].split(".")[0]
        groups[0 if module == "sys" else 2 if module == "eval" else 1].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group).splitlines()


def image_program(inputs: ModelInputs, usage: Usage) -> list[str]:
    """Return the program lines that classify image files given on the command line."""
    assert inputs.pixels is not None
    return [
        f"classes = {list(inputs.classes)!r}",
        "",
        "",
        *pixels_function(inputs.pixels),
        "",
        "",
        "for path in sys.argv[1:]:  # image files",
        f"    inputs = {{'pixel_values': {'pixels(path)' if usage.arrays else 'torch.from_numpy(pixels(path))'}}}",
        *(f"    {line}" for line in usage.call.splitlines()),
        "    print(path, classes[int(logits[0].argmax())])",
    ]


def pixels_function(pixels: Pixels) -> list[str]:
    """Return the lines of a function that preprocesses an image file in the same way as the run."""
    mode, side, window = ("L" if pixels.channels == 1 else "RGB"), pixels.side, pixels.window
    lines = [
        "def pixels(path):",
        '    """float32 array (1, channels, height, width) of an image file, as the model was trained on."""',
        f'    image = ImageOps.exif_transpose(Image.open(path)).convert("{mode}")',
        f"    scale = {side} / min(image.size)",
        f"    width, height = (max({side}, round(length * scale)) for length in image.size)",
        f"    left, top = (width - {side}) // 2, (height - {side}) // 2",
        f"    image = image.resize((width, height), {pixels.resample})"
        f".crop((left, top, left + {side}, top + {side}))  # {FILTERS.get(pixels.resample, '')}",
        f"    x = np.asarray(image, dtype=np.float32).reshape({side}, {side}, {pixels.channels})",
    ]
    if window != side:
        margin = (side - window) // 2
        lines.append(f"    x = x[{margin} : {margin + window}, {margin} : {margin + window}]")
    mean, std = (", ".join(f"{value!r}" for value in values) for values in (pixels.mean, pixels.std))
    lines += [
        f"    mean, std = np.array([{mean}], np.float32), np.array([{std}], np.float32)",
        "    x = np.ascontiguousarray(((x / 255 - mean) / std).transpose(2, 0, 1)[None])",
    ]
    if pixels.size == window:
        return [*lines, "    return x"]
    enlarged = f'size=({pixels.size}, {pixels.size}), mode="bilinear", align_corners=False'
    return [*lines, f"    return torch.nn.functional.interpolate(torch.from_numpy(x), {enlarged}).numpy()"]


def text_program(inputs: ModelInputs, usage: Usage) -> list[str]:
    """Return the program lines that run the model on an example text for its task."""
    options = f'truncation=True, max_length={inputs.max_length}, return_tensors="{"np" if usage.arrays else "pt"}"'
    if inputs.kind == "lm":
        return [
            'text = "The"',
            f"inputs = tokenizer(text, add_special_tokens=False, {options})",
            usage.call,
            "print(text, tokenizer.decode([int(logits[0, -1].argmax())]))  # the most likely next token",
        ]
    if inputs.kind == "qa":
        spans = ["answer.start_logits", "answer.end_logits"]
        call = usage.call.replace("logits = ", "answer = ").replace(".logits", "")
        if usage.arrays:
            spans = ["start_logits", "end_logits"]
            call = usage.call.replace('logits = session.run(["logits"], feed)[0]', f"{', '.join(spans)} = {SPANS}")
        return [
            'question, context = "Who wrote it?", "It was written by Ann in Oslo."',
            f"inputs = tokenizer(question, context, {options})",
            call,
            f"start, end = int({spans[0]}[0].argmax()), int({spans[1]}[0].argmax())",
            'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
        ]
    if inputs.kind == "summary":
        return [
            f'inputs = tokenizer("A text to be summed up.", {options})',
            'inputs.pop("token_type_ids", None)',
            f"written = model.generate(**inputs, max_new_tokens={inputs.max_target_length}, max_length=None)",
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
        ]
    if inputs.candidates:
        answers = [f"answer {number + 1}" for number in range(inputs.candidates)]
        return [
            f'question, answers = "A question?", {answers!r}',
            f"inputs = tokenizer([question] * len(answers), answers, padding=True, {options})",
            "inputs = {name: values.reshape(1, *values.shape) for name, values in inputs.items()}",
            usage.call,
            "print(question, answers[int(logits[0].argmax())])",
        ]
    texts = [f"The {name} of an example." for name in inputs.columns]
    return [
        f"texts = {texts!r}  # {', '.join(inputs.columns)}",
        f"inputs = tokenizer(*texts, {options})",
        *([] if inputs.regression else [f"classes = {list(inputs.classes)!r}"]),
        usage.call,
        "print(*texts, float(logits[0, 0]))" if inputs.regression else
        "print(*texts, classes[int(logits[0].argmax())])",
    ]  # fmt: skip


def summary(verdict: dict[str, Any]) -> list[str]:
    """Summarize the verdict in lines of text: cost, file size, and the metrics before and after the export."""
    cost, size = verdict["cost"], verdict["size"]
    target = "" if cost["target"] is None else f", target {cost['target']:.6g}"
    lines = [
        f"{cost['type']}: {cost['chosen']:.6g} {cost['unit']} chosen, {cost['exported']:.6g} exported{target}",
        f"file: {size['file_bytes']:,} bytes, {size['ratio']:.3f} of float32 ({size['float32_bytes']:,})",
    ]
    for split, before in verdict["metrics"]["record"].items():
        after = (verdict["metrics"]["exported"] or {}).get(split)
        names = [name for name in before if name not in ("n", "loss")]
        changes = [
            f"{name} {before[name]:.5g} -> {'not evaluated' if after is None else f'{after[name]:.5g}'}"
            for name in names
        ]
        lines.append(f"{split}: {', '.join(changes)} (n {before['n']})")
    return [*lines, *verdict["notes"]]
