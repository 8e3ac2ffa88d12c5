"""Rotate the residual stream of a model by an orthogonal matrix, and the values of its heads, without changing outputs.

Rotated activations have no outlier channels, so that few bits suffice for them. An RMSNorm without weight commutes with
every rotation, a LayerNorm without weight with every rotation that keeps the mean. So norm weights move into the layers
behind them first; then all that writes to the stream is multiplied by Q, and all that reads it by Q transposed.

Source: QuaRot (arXiv 2404.00456), the rotations that cost nothing at inference; norms: SliceGPT (arXiv 2401.15024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.errors import UserError
from quant.module_utils import evaluating
from quant.quant_experts import ExpertLinear
from quant.transforms.graph import is_norm, outputs
from quant.transforms.residual import Attention, BareLinear, Stream, trace_streams

_LAYERS = (nn.Linear, Conv1D, ExpertLinear)
CHUNK = 2**24
"""Values of a weight that are rotated at once, in float64."""


# ------------------------------------------------------ matrices


def hadamard(size: int) -> Tensor | None:
    """Construct a Hadamard matrix: entries 1 and -1, orthogonal rows.

    Sylvester's doubling of one of Paley's two constructions over the integers modulo a prime.

    Args:
        size: Number of rows.

    Returns:
        float64 (size, size); None if these constructions have none of this size.
    """
    twice = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    core, doublings = size, 0
    while core % 2 == 0:
        core, doublings = core // 2, doublings + 1
    while doublings >= 0:  # the smallest core first, so that powers of two are Sylvester's alone
        matrix = _paley(core)
        if matrix is not None:
            for _ in range(doublings):
                matrix = torch.kron(twice, matrix)
            return matrix
        core, doublings = 2 * core, doublings - 1
    return None


def _paley(size: int) -> Tensor | None:
    """Return a Hadamard matrix by Paley's construction I (size - 1 a prime 4k + 3) or II (size / 2 - 1, 4k + 1)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    if size == 1:
        return one
    if size % 4:
        return None
    if (size - 1) % 4 == 3 and _is_prime(size - 1):
        return torch.eye(size, dtype=torch.float64) + _bordered(size - 1, -1.0)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        conference, identity = _bordered(size // 2 - 1, 1.0), torch.eye(size // 2, dtype=torch.float64)
        return torch.kron(conference, plus.double()) + torch.kron(identity, minus.double())
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Return the Jacobsthal matrix of a prime with a first row of ones and a first column of `sign`, the corner 0."""
    squares = {x * x % prime for x in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, prime)], dtype=torch.float64)
    rows = torch.arange(prime)
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    bordered[1:, 1:] = character[(rows[:, None] - rows) % prime]
    bordered[0, 1:], bordered[1:, 0] = 1.0, sign
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def random_rotation(size: int, generator: torch.Generator, *, keeps_mean: bool = False) -> tuple[Tensor, bool]:
    """Draw an orthogonal matrix: a Hadamard matrix with random signs, where there is one.

    Args:
        size: Number of rows.
        generator: Source of the random signs.
        keeps_mean: Whether the matrix must keep the vector of ones, so that the mean of a rotated vector is the same.
            It is H D H^T then, with H's first column constant and D = diag(1, random signs).

    Returns:
        float64 (size, size), and whether it is made of a Hadamard matrix (else of a QR decomposition).
    """
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    base = hadamard(size)
    if base is None:
        drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
        drawn[:, 0] = 1.0 if keeps_mean else drawn[:, 0]
        orthogonal = torch.linalg.qr(drawn)[0]
    else:
        orthogonal = base * base[:, :1] / math.sqrt(size)  # rows with negated signs: the first column is constant
    if not keeps_mean:
        return orthogonal * signs, base is not None
    signs[0] = 1.0
    return orthogonal * signs @ orthogonal.T, base is not None


@torch.no_grad()
def multiply(weight: Tensor, axis: int, matrix: Tensor, gain: Tensor | None = None) -> None:
    """Replace each run of len(matrix) entries v along an axis by matrix @ (gain * v), in place, computed in float64.

    Args:
        weight: The tensor.
        axis: Its axis, whose size is a multiple of that of the matrix.
        matrix: float64 (n, n).
        gain: float64 (size of the axis,), None: ones.
    """
    rows = weight.movedim(axis, -1)
    if rows.dim() == 1:
        rows = rows.unsqueeze(0)
    step = max(CHUNK // rows[0].numel(), 1)
    matrix = matrix.to(weight.device)
    for part in rows.split(step):
        values = part.double() if gain is None else part.double() * gain.to(weight.device)
        part.copy_((values.unflatten(-1, (-1, len(matrix))) @ matrix.T).flatten(-2))


# ------------------------------------------------------ the stream


@dataclass(frozen=True)
class _Change:
    """A rotation of one parameter along one axis, behind a gain."""

    owner: Any
    parameter: Tensor
    axis: int
    gain: Tensor | None = None


@torch.no_grad()
def rotate(model: nn.Module, example: Any, seed: int = 0) -> list[str]:
    """Rotate the residual streams of a model, in place, and the values of its heads where a layer makes them alone.

    Args:
        model: The float model. A head that is tied to the embedding gets a weight of its own, unless the norm before
            it multiplies all channels by the same number.
        example: A batch; a forward pass over it shows what reads and writes the residual stream.
        seed: Seed of the rotations.

    Returns:
        Notes for the user: weights that are no longer tied, rotations without a Hadamard matrix, heads left out.

    Raises:
        UserError: The model has no residual stream that can be rotated; nothing is changed then. Or its outputs have
            changed, by code that cannot be traced; the model is spoilt then.
    """
    with evaluating(model):
        before = outputs(model, example)
    names = {module: name for name, module in model.named_modules()}
    streams = trace_streams(model, example)
    residual = [stream for stream in streams if any(isinstance(w, nn.Embedding) for w in stream.writers)]
    residual = [stream for stream in residual if any(is_norm(r) for r in stream.readers if isinstance(r, nn.Module))]
    if not residual:
        _refuse(model, "has no residual stream that leads from an embedding to norms")
    _check_called(model, streams, {width for stream in residual for width in stream.widths})
    norms: dict[nn.Module, list[Any]] = {}
    for stream in residual:
        _check(model, stream, names)
        for norm in (reader for reader in stream.readers if isinstance(reader, nn.Module) and is_norm(reader)):
            norms[norm] = _readers(model, norm, streams, names)
    keeps_mean = any(_centres(norm, stream) for stream in residual for norm in norms if norm in stream.norm_inputs)
    generator = torch.Generator().manual_seed(seed)
    rotations: dict[int, Tensor] = {}
    notes = []
    for (width,) in sorted(stream.widths for stream in residual):
        if width not in rotations:
            rotations[width], exact = random_rotation(width, generator, keeps_mean=keeps_mean)
            if not exact:
                notes.append(f"--rotate: no Hadamard matrix of {width} rows is known here, so Q is a random rotation")
    gains = {
        norm: _fold(norm, readers, stream.norm_inputs[norm], rotations[min(stream.widths)])
        for stream in residual
        for norm, readers in norms.items()
        if norm in stream.norm_inputs
    }
    changes = [change for stream in residual for writer in stream.writers for change in _written(writer)]
    changes += [_read(reader) for stream in residual for reader in stream.readers if reader not in norms]
    changes += [replace(_read(reader), gain=gains[norm]) for norm, readers in norms.items() for reader in readers]
    notes += _apply(model, changes, rotations, names)
    if not _same(before, model, example):
        _refuse(model, "computes something else when rotated: code that cannot be traced reads its residual stream")
    return notes + _rotate_heads(model, example, streams, before, generator)


def _refuse(model: nn.Module, why: str) -> Any:
    raise UserError(f"--rotate: {type(getattr(model, 'model', model)).__name__} {why}")


def _check_called(model: nn.Module, streams: Sequence[Stream], widths: set[int]) -> None:
    """Check that the example reaches every layer that may touch the stream: the others' places are not known."""
    called = {id(module) for stream in streams for module in (*stream.readers, *stream.writers)}
    for name, layer in model.named_modules():
        if isinstance(layer, _LAYERS) and id(layer) not in called and widths & set(layer.weight.shape):
            _refuse(model, f"does not call its layer {name} on an example, so what it reads is not known")


def _check(model: nn.Module, stream: Stream, names: Mapping[nn.Module, str]) -> None:
    """Check that everything around the residual stream can be rotated."""
    for writer in stream.writers:
        if not isinstance(writer, (nn.Embedding, *_LAYERS)):
            what = f"the {type(writer).__name__} {names.get(writer, '')}".strip()
            _refuse(model, f"adds the output of {what} to its residual stream, which no rotation can pass")
    if stream.others:
        _refuse(model, f"reads its residual stream in another way than by norms and layers: {stream.others[0]}")
    if len(stream.widths) > 1:
        _refuse(model, f"splits its residual stream into parts of {min(stream.widths)} channels")
    for reader in stream.readers:
        if not isinstance(reader, nn.Module) or is_norm(reader):
            continue
        if not isinstance(reader, _LAYERS):
            _refuse(model, f"reads its residual stream with the {type(reader).__name__} {names[reader]}")


def _readers(model: nn.Module, norm: nn.Module, streams: Sequence[Stream], names: Mapping[nn.Module, str]) -> list[Any]:
    """Return the layers that read a norm's output; raise UserError if anything else does."""
    behind = [stream for stream in streams if norm in stream.writers]
    for stream in behind:
        others = [w for w in stream.writers if w is not norm]
        others += [reader for reader in stream.readers if not isinstance(reader, (*_LAYERS, BareLinear))]
        if others or stream.others or stream.values or len(stream.widths) > 1:
            what = stream.others[0] if stream.others else type((others or [norm])[0]).__name__
            _refuse(model, f"reads the output of its norm {names[norm]} with more than layers: {what}")
    return [reader for stream in behind for reader in dict.fromkeys(stream.readers)]


def _centres(norm: Any, stream: Stream) -> bool:
    """Whether a norm subtracts the mean, so that a number added to all channels changes nothing."""
    x = stream.norm_inputs[norm]
    forward: Callable[..., Tensor] = norm.forward
    own = forward(x).float()
    change = forward(x + x.float().square().mean().sqrt().to(x)).float() - own
    return bool(change.abs().mean() < 0.1 * own.abs().mean())


@torch.no_grad()
def _fold(norm: Any, readers: Sequence[Any], x: Tensor, rotation: Tensor) -> Tensor | None:
    """Take the gain and the bias of a norm out of it; the bias goes to the readers', where all have one.

    Args:
        norm: The norm; changed in place.
        readers: The layers that read its output; their biases may change.
        x: A tensor that it reads.
        rotation: Matrix of the stream.

    Returns:
        float64 (channels,), the gain that the readers' weights must take over; None if it is the same number for all
        channels, and stays in the norm.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    own = weight.detach().clone()
    weight.zero_()
    silent = norm.forward(x) if bias is None else norm.forward(x) - bias
    neutral = 1.0 if not silent.any() else 0.0  # 0: the norm multiplies by 1 + weight
    gain = own.double() + (1.0 - neutral)
    constant = bool((gain == gain[0]).all()) and bool(gain[0] != 0)
    weight.copy_(own if constant else torch.full_like(own, neutral))
    if bias is not None and bias.any():
        shift = bias.detach().double()
        if all(isinstance(reader, nn.Linear | Conv1D) and reader.bias is not None for reader in readers):
            for reader in readers:
                matrix = reader.weight.double().movedim(_input_axis(reader), -1)
                reader.bias.add_((matrix @ shift).to(reader.bias))
            bias.zero_()
        else:
            gain = torch.where(gain == 0, torch.full_like(gain, 1e-5), gain)  # the bias must not be divided by 0
            bias.copy_((rotation.to(gain) @ (shift if constant else shift / gain)).to(bias))
    return None if constant else gain


def _input_axis(layer: Any) -> int:
    if isinstance(layer, ExpertLinear):
        return 1 if layer.transposed else 2
    return 0 if isinstance(layer, Conv1D) else 1


def _read(layer: Any) -> _Change:
    """Return the rotation of a layer's input side."""
    return _Change(layer, layer.weight, _input_axis(layer))


def _written(layer: Any) -> list[_Change]:
    """Return the rotations of a layer's output side, or of an embedding's rows."""
    if isinstance(layer, nn.Embedding):
        return [_Change(layer, layer.weight, 1)]
    axis = 3 - _input_axis(layer) if isinstance(layer, ExpertLinear) else 1 - _input_axis(layer)
    bias = getattr(layer, "bias", None)
    return [_Change(layer, layer.weight, axis)] + ([_Change(layer, bias, bias.dim() - 1)] if bias is not None else [])


def _apply(
    model: nn.Module, changes: Sequence[_Change], rotations: Mapping[int, Tensor], names: Mapping[nn.Module, str]
) -> list[str]:
    """Carry out each change once; a layer that is tied to a weight that changes differently gets a weight of its own.

    Returns:
        A note if weights are no longer tied.
    """
    gains: dict[tuple[int, int], Tensor | None] = {}
    once, untied = [], []
    for change in changes:
        key = id(change.parameter), change.axis
        if key in gains and gains[key] is not change.gain:
            untied.append(change)
        elif key not in gains:
            once.append(change)
            gains[key] = change.gain
    untie(model, [names[change.owner] for change in untied])
    once += [replace(change, parameter=change.owner.weight) for change in untied]
    for change in once:
        multiply(change.parameter, change.axis, rotations[change.parameter.shape[change.axis]], change.gain)
    if not untied:
        return []
    layers = ", ".join(names[change.owner] for change in untied)
    return [f"--rotate: {layers} is no longer tied to the embedding, and counts in memory"]


def untied_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that `untie` has given a weight of their own."""
    return [name for name, module in model.named_modules() if module.__dict__.get("untied")]


def untie(model: nn.Module, names: Sequence[str]) -> None:
    """Give layers that are tied to an embedding a weight of their own, and let the model's configuration say so.

    Args:
        model: The model; changed in place.
        names: Names of the layers.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        layer.__dict__["untied"] = True
    for module in model.modules() if names else ():
        config: Any = getattr(module, "config", None)
        for settings in (config, getattr(config, "text_config", None)):
            if settings is not None and getattr(settings, "tie_word_embeddings", False):
                settings.tie_word_embeddings = False


def _same(before: Sequence[Tensor], model: nn.Module, example: Any) -> bool:
    """Whether the outputs are still the same, up to rounding."""
    with evaluating(model):
        after = outputs(model, example)
    tolerance = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) ** 0.5
    return all(
        torch.allclose(now, then, rtol=0, atol=tolerance * float(then.nan_to_num(0, 0, 0).abs().max()), equal_nan=True)
        for then, now in zip(before, after, strict=True)
        if then.is_floating_point() and then.numel()
    )


# ------------------------------------------------------ the heads


def _rotate_heads(
    model: nn.Module, example: Any, streams: Sequence[Stream], before: Sequence[Tensor], generator: torch.Generator
) -> list[str]:
    """Rotate the values of each head, and back in the layer that reads the attention's output.

    Returns:
        A note on calls of attention whose values have no layer of their own, or whose output has other readers.
    """
    calls = {value: stream for stream in streams for value in stream.values}
    rotations = {size: random_rotation(size, generator)[0] for size in sorted({c.head_dim for c in calls})}
    changes: list[tuple[_Change, Tensor]] = []
    for call, stream in calls.items():
        pair = _around(call, stream, streams)
        if pair is not None:
            parts = [*_written(pair[0]), _read(pair[1])]
            changes += [(part, rotations[call.head_dim]) for part in parts]
    if len(dict.fromkeys((id(c.parameter), c.axis) for c, _ in changes)) < len(changes):
        changes = []  # layers that are called twice
    for change, matrix in changes:
        multiply(change.parameter, change.axis, matrix)
    if changes and not _same(before, model, example):
        for change, matrix in changes:
            multiply(change.parameter, change.axis, matrix.T)
        changes = []
    rotated = sum(1 for change, _ in changes if change.parameter.dim() == 2) // 2
    if rotated == len(calls):
        return []
    return [f"--rotate: the heads' values of {len(calls) - rotated} of {len(calls)} attentions are not rotated"]


def _around(call: Attention, values: Stream, streams: Sequence[Stream]) -> tuple[nn.Module, nn.Module] | None:
    """Return the layer that makes the values of a call of attention and nothing else, and the one that reads it."""
    (output,) = (stream for stream in streams if call in stream.writers)
    makers, readers = values.writers, output.readers
    single = values.values == [call] and output.writers == [call] and len(makers) == 1 and len(readers) == 1
    if not single or values.others or values.readers or output.others or output.values:
        return None
    maker, reader = makers[0], readers[0]
    if not (isinstance(maker, nn.Linear | Conv1D) and isinstance(reader, nn.Linear | Conv1D)):
        return None
    sides = (*_written(maker), _read(reader))
    return None if any(s.parameter.shape[s.axis] % call.head_dim for s in sides) else (maker, reader)
