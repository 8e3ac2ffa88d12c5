"""Placement: quantize tensors other than the inputs and weights of layers, at sites found in one forward pass.

Norms, GELU and softmax compute in float between quantized inputs and outputs; residual additions and products of
activations (queries with keys, attention probabilities with values) read quantized tensors; embeddings are rounded row
by row. Each of these sites belongs to the quantized layer that was called last before it (the first layer, if none was)
and takes its format, so that a search decides on both together.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.convert import run_model
from quant.errors import UserError
from quant.module_utils import Arguments, evaluating, first_tensor, replace_first_tensor
from quant.quant_cache import QuantCache
from quant.quant_module import TABLE, QuantModule
from quant.quantizers.quantizer import Quantizer, QuantizerConfig
from quant.transforms.graph import ADD, is_norm
from quant.transforms.shortcut import Shortcut
from quant.validation import HIGH_PRECISION_OPS

_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
CACHED = "cached"
"""Last part of the names of the sites that belong to a `QuantCache`."""
_TABLE = QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=True)
"""For embeddings: a symmetric scale per row, which corresponds to a weight's scale per channel."""
_PLAIN_OBSERVER = {"avg_prune_minmax": "minmax"}
"""Observer -> replacement for attention probabilities: Token-Wise Clipping does not apply there (arXiv 2209.13325)."""


@dataclass(frozen=True)
class Placement:
    """Which tensors are quantized besides inputs and weights of layers."""

    high_precision_ops: Collection[str] = ()
    """Names of `HIGH_PRECISION_OPS` that compute in float between quantized inputs and outputs."""
    residual_adds: bool = False
    """Quantize both inputs of residual additions."""
    products: bool = False
    """Quantize both inputs of products of activations: queries, keys, attention probabilities, values."""
    embeddings: bool = False
    """Quantize embeddings, with a scale per row, in the format of the first layer's weight."""
    caches: bool = False
    """Quantize keys and values where attention reads them, in formats of their own, see `quant.transforms.kv_cache`."""

    def __post_init__(self) -> None:
        for op in self.high_precision_ops:
            if op not in HIGH_PRECISION_OPS:
                raise UserError(f"high_precision_ops: unknown {op!r}; choices: {', '.join(HIGH_PRECISION_OPS)}")

    def __bool__(self) -> bool:
        return bool(self.high_precision_ops) or self.residual_adds or self.products or self.embeddings or self.caches


def place_quantizers(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    example: Any,
    placement: Placement,
    cached: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Find the sites of a placement and quantize there, in place, in the current formats of the layers.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        example: A batch; sites are those that a forward pass over it reaches.
        placement: What to quantize.
        cached: Sites of caches -> names of the caches, see `quant.transforms.kv_cache`.

    Returns:
        Site -> name of the layer that it belongs to, for `attach_quantizers`.
    """
    found: dict[str, str] = {}
    if placement:
        watching = _Placer(model, modules, placement)
        try:
            with torch.no_grad(), evaluating(model):
                run_model(model, example)
        finally:
            watching.remove()
        found = watching.found
    found |= cached or {}
    attach_quantizers(model, modules, found)
    return found


def trace_cached(model: nn.Module, batch: Any) -> tuple[dict[str, Tensor], Any]:
    """Find where attention reads keys and values, (..., tokens, head_dim), in one forward pass in eval mode.

    Args:
        model: The model.
        batch: A batch.

    Returns:
        Site -> keys or values, in the order of the reads; and the model's output.
    """
    watching = _Placer(model, {}, Placement(caches=True))
    try:
        with torch.no_grad(), evaluating(model):
            output = run_model(model, batch)
    finally:
        watching.remove()
    return watching.cached, output


def attach_quantizers(model: nn.Module, modules: Mapping[str, QuantModule], sites: Mapping[str, str]) -> None:
    """Quantize at known sites, as when a saved model is loaded; calibration or a state dict sets the ranges.

    Args:
        model: The quantized model; changed in place.
        modules: Its quantized layers, by name.
        sites: Site -> name of the layer that it belongs to; for keys and values, of the `QuantCache`, which is added.
    """
    if not sites:
        return
    for site, name in sites.items():
        if is_cached(site):
            add_cache(model, name)
        else:
            modules[name].place(f"{site}_quantizer", _quantizer(site, modules[name].input_quantizer))
    # Not set as an attribute: as a child module it would be one more step of an nn.Sequential.
    model.__dict__["placer"] = _Placer(model, modules, sites=sites)


def placed_sites(model: nn.Module) -> dict[str, str]:
    """Return site -> layer name, as `place_quantizers` did; empty if nothing was placed."""
    placer = model.__dict__.get("placer")
    return dict(placer.sites) if placer is not None else {}


def is_cached(site: str) -> bool:
    """Whether a site belongs to a `QuantCache`."""
    return site.rpartition(":")[2] == CACHED


def add_cache(model: nn.Module, name: str) -> QuantCache:
    """Return the `QuantCache` of that name in a model, which is added if there is none."""
    holder, _, own = name.rpartition(".")
    parent = model.get_submodule(holder)
    if own not in parent._modules:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        parent.add_module(own, QuantCache(device))
    cache = parent._modules[own]
    assert isinstance(cache, QuantCache)
    return cache


def _quantizer(site: str, beside: Quantizer) -> Quantizer:
    """Create a quantizer like a layer's own, prepared for the same formats."""
    config, op = beside.config, site.rpartition(":")[2]
    if op == TABLE:
        config = _TABLE
    elif op == "probabilities":
        config = replace(config, observer=_PLAIN_OBSERVER.get(config.observer, config.observer))
    quantizer = Quantizer(config, device=beside.anchor.device)
    for format in beside.prepared:
        quantizer.prepare(format)
    return quantizer


class _Frame:
    """A module call in progress."""

    def __init__(self, path: str, closed: bool) -> None:
        self.path, self.closed = path, closed
        self.calls: Counter[str] = Counter()
        self.products: list[tuple[str, Tensor]] = []
        """Site and second factor of the last product."""
        self.weighs = False
        """Whether a softmax has followed that product, so that the next one weighs values."""


class _Placer:
    """Hooks in every module of a model, which pass the tensors at the sites through their quantizers.

    With a placement instead of sites, it only records its sites in `found`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, QuantModule],
        placement: Placement | None = None,
        sites: Mapping[str, str] | None = None,
    ) -> None:
        self.sites = dict(sites or {})
        self.placement = placement
        self.found: dict[str, str] = {}
        self.cached: dict[str, Tensor] = {}
        """While searching for sites of caches: site -> keys or values."""
        self.owners = {
            site: model.get_submodule(name) if is_cached(site) else modules[name] for site, name in self.sites.items()
        }
        self.shortcuts = [module for module in model.modules() if isinstance(module, Shortcut)]
        self.frames: list[_Frame] = []
        self.mode = _Mode(self)
        self.owner = ""
        self.read: dict[int, weakref.ref[Tensor]] = {}
        names = {module: name for name, module in modules.items() if not isinstance(module, nn.Embedding)}
        hooks = []
        for dotted, module in model.named_modules():
            if isinstance(module, Shortcut | Quantizer):
                continue
            path = dotted.replace(".", "/")  # sites become names of modules, which must not contain dots
            leave: Any = partial(self.leave, path, _kind(module), names.get(module))  # type: ignore[call-overload]
            hooks.append(module.register_forward_pre_hook(partial(self.enter, path, _kind(module)), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        if placement is not None:  # a permanent placer is copied with the model, and hook handles cannot be copied
            self.hooks = hooks

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    # ------------------------------------------------------ modules

    def enter(
        self, path: str, kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Forward pre-hook: quantize what the module reads."""
        outer = bool(self.frames) and self.frames[-1].closed
        if not self.frames:
            self.mode.__enter__()
        self.frames.append(_Frame(path, outer or kind != ""))
        x = first_tensor(args, kwargs)
        if outer or kind == "" or x is None:
            return None
        if self.placement is not None and kind in ("layer", "layernorm"):
            self.read[id(x)] = weakref.ref(x)
        return replace_first_tensor(lambda read: self.pass_on(f"{path}:{kind}:in", read, kind), args, kwargs)

    def leave(
        self, path: str, kind: str, name: str | None, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Tensor | None:
        """Forward hook: quantize what the module returns."""
        if name is not None:
            # Sites before all layers belong to the first one that is called, as `quantizers.prefix_cache` requires.
            if not self.owner:
                self.found = {site: owner or name for site, owner in self.found.items()}
            self.owner = name
        try:
            outer = len(self.frames) > 1 and self.frames[-2].closed
            if outer or kind == "" or not isinstance(output, Tensor):
                return None
            return self.pass_on(f"{path}:{kind}:{TABLE if kind == 'embedding' else 'out'}", output, kind)
        finally:
            self.frames.pop()
            if not self.frames:
                self.mode.__exit__(None, None, None)

    # ------------------------------------------------------ functions

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function, with quantizers at its sites.

        Args:
            function: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the function returns for the quantized arguments.
        """
        frame = self.frames[-1]
        if frame.closed:
            return function(*args, **kwargs)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        if function in ADD and len(args) == 2 and not kwargs and _alike(*args):
            return self.add(frame, function, *args)
        if function is F.gelu:
            start = self.site(frame, "gelu")
            made = function(self.pass_on(f"{start}:in", args[0], "gelu"), *args[1:], **kwargs)
            return self.pass_on(f"{start}:out", made, "gelu")
        if function in _SOFTMAX and args[0].is_floating_point():
            start = self.site(frame, "softmax")
            made = function(self.scores(f"{start}:in", args[0]), *args[1:], **kwargs)
            self.note_keys(frame)
            return self.pass_on(f"{start}:probabilities", made, "softmax", tokens=made.dim() - 2)
        if function in _MATMUL and not any(isinstance(arg, nn.Parameter) for arg in args):
            start = self.site(frame, "product")
            parts = [self.pass_on(f"{start}:{i}", arg, "product", _tokens_of(arg, i)) for i, arg in enumerate(args)]
            parts[1:] = [self.store(f"{start}:1:{CACHED}", part, _tokens_of(part, 1)) for part in parts[1:]]
            if self.placement is not None and self.placement.caches and len(parts) == 2:
                self.note_product(frame, f"{start}:1:{CACHED}", parts[1])
            return function(*parts, **kwargs)
        if function is F.scaled_dot_product_attention:
            return self.attend(self.site(frame, "attention"), function, args, kwargs)
        return function(*args, **kwargs)

    def site(self, frame: _Frame, op: str) -> str:
        """Return the name of a site: the module, the operation, and the number of the call."""
        frame.calls[op] += 1
        return f"{frame.path}:{op}{frame.calls[op]}"

    def add(self, frame: _Frame, function: Any, left: Tensor, right: Tensor) -> Tensor:
        """Add two tensors of the same shape, quantized if the sum is a residual addition."""
        start = self.site(frame, "add")
        if self.placement is not None and not (self.was_read(left) or self.was_read(right)):
            return function(left, right)
        kept = left.clone() if function in _IN_PLACE else left  # a quantizer's backward pass needs its input
        parts = [self.pass_on(f"{start}:{side}", x, "add") for side, x in (("left", kept), ("right", right))]
        for shortcut in self.shortcuts:  # a migrated shortcut must apply its gain to the quantized tensor
            for x, rounded in zip((left, right), parts, strict=True):
                if shortcut.latest is not None and shortcut.latest.data_ptr() == x.data_ptr():
                    shortcut.latest = rounded
        if function in _IN_PLACE:
            return left.copy_(torch.add(*parts))
        return function(*parts)

    def was_read(self, x: Tensor) -> bool:
        """Whether a layer or norm has already read x in this pass: only then is x a shortcut."""
        known = self.read.get(id(x))
        return known is not None and known() is x

    def attend(self, start: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute scaled dot-product attention, in explicit steps if scores or probabilities are quantized.

        Args:
            start: Name of the call.
            function: F.scaled_dot_product_attention.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            (..., T, head_dim).
        """
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (
            self.pass_on(f"{start}:{name}", given[name], "product", tokens=2) for name in ("query", "key", "value")
        )
        key, value = self.store(f"{start}:key:{CACHED}", key), self.store(f"{start}:value:{CACHED}", value)
        if self.placement is not None and self.placement.caches:
            self.cached |= {f"{start}:key:{CACHED}": key, f"{start}:value:{CACHED}": value}
        if not any(self.wants(f"{start}:{part}", "softmax") for part in ("scores", "probabilities")):
            return function(query, key, value, **{name: given[name] for name in names[3:] if name in given})
        if given.get("enable_gqa"):
            repeat = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
        scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
        scores = self.scores(f"{start}:scores", query @ key.transpose(-2, -1) * scale)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        made = torch.softmax(scores.float(), dim=-1).to(query)
        if mask is not None:
            made = torch.nan_to_num(made)  # a padded query may have no key to attend to
        made = self.pass_on(f"{start}:probabilities", made, "softmax", tokens=2)
        return F.dropout(made, given.get("dropout_p", 0.0)) @ value

    # ------------------------------------------------------ caches

    def note_product(self, frame: _Frame, site: str, factor: Tensor) -> None:
        """Remember the second factor of a product; after a softmax of the last product, it holds values."""
        if frame.weighs:
            self.cached[site] = factor
        frame.products, frame.weighs = [(site, factor)], False

    def note_keys(self, frame: _Frame) -> None:
        """Take the second factor of the product before a softmax for keys."""
        for site, factor in frame.products:
            self.cached[site] = factor.transpose(-1, -2)
            frame.weighs = True
        frame.products = []

    def store(self, site: str, x: Tensor, tokens: int = -2) -> Tensor:
        """Round keys or values as a cache stores them.

        Args:
            site: Name of the site.
            x: (..., tokens, head_dim), or with both axes exchanged.
            tokens: The axis of tokens.
        """
        cache = self.owners.get(site)
        if cache is None:
            return x
        turned = tokens % x.dim() == x.dim() - 1
        rounded: Tensor = cache(x.transpose(-1, -2) if turned else x)
        return rounded.transpose(-1, -2) if turned else rounded

    # ------------------------------------------------------ softmax

    def scores(self, site: str, x: Tensor) -> Tensor:
        """Quantize softmax inputs, (..., T, S); masked entries keep their value and do not count for the range."""
        if not self.wants(site, "softmax"):
            return x
        masked = x < torch.finfo(x.dtype).min / 4
        return torch.where(masked, x, self.pass_on(site, x.masked_fill(masked, 0.0), "softmax", tokens=x.dim() - 2))

    # ------------------------------------------------------ quantizers

    def wants(self, site: str, op: str) -> bool:
        """Whether a site is quantized; while searching for sites, records it if it will be."""
        if self.placement is None:
            return site in self.owners
        placement, part = self.placement, site.rpartition(":")[2]
        asked = {
            "add": placement.residual_adds,
            "product": placement.products,
            "embedding": placement.embeddings and part == TABLE,
            "softmax": "softmax" in placement.high_precision_ops or (placement.products and part == "probabilities"),
        }
        if asked.get(op, op in placement.high_precision_ops):
            self.found.setdefault(site, self.owner)
        return site in self.found

    def pass_on(self, site: str, x: Tensor, op: str, tokens: int = 1) -> Tensor:
        """Quantize x if the site is quantized, and observe it during calibration.

        Args:
            site: Name of the site.
            x: The tensor.
            op: The operation.
            tokens: The axis of x that belongs to tokens.
        """
        if not self.wants(site, op) or self.placement is not None:
            return x
        owner: Any = self.owners[site]
        quantizer = owner.placed[f"{site}_quantizer"]
        if owner.observing:
            quantizer.observe(x.movedim(tokens, 1) if x.dim() > 2 else x)
        return quantizer(x)


class _Mode(TorchFunctionMode):
    def __init__(self, placer: _Placer) -> None:
        super().__init__()
        self.placer = placer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.placer.call(func, args, kwargs or {})


def _kind(module: nn.Module) -> str:
    """Return the kind of a module that is treated as a unit; '' for one whose inner operations are looked at."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, QuantModule | QuantCache | nn.Linear | nn.Conv2d):
        return "layer"
    if is_norm(module) and not isinstance(module, nn.BatchNorm2d):
        return "layernorm"
    return "gelu" if "GELU" in type(module).__name__ and not any(module.children()) else ""


def _alike(left: Any, right: Any) -> bool:
    return (
        isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape
        and left.is_floating_point() and left.dim() >= 2
    )  # fmt: skip


def _tokens_of(x: Tensor, place: int) -> int:
    """Return the axis of a product's factor that belongs to tokens: keys are transposed, queries and values are not."""
    return x.dim() - 1 if place == 1 and x.stride(-1) > x.stride(-2) else x.dim() - 2
