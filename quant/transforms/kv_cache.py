"""Find the key-value caches of a model: the keys and values of each attention, as the model stores them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quant.cache_formats import bits_per_value
from quant.errors import UserError
from quant.formats import Format, parse_format
from quant.quant_cache import QuantCache
from quant.transforms.placement import attach_quantizers, is_cached, placed_sites, trace_cached

CACHE_NAME = "kv_cache"
"""Name of a `QuantCache` within its attention."""


@dataclass(frozen=True)
class CachedAttention:
    """An attention whose keys and values a model stores."""

    name: str
    """Name of the `QuantCache` in the model."""
    sites: tuple[str, ...]
    """Where keys and values are read, see `quant.transforms.placement`."""
    heads: int
    """Stored vectors per token: those of keys and those of values."""
    values: int
    """Stored numbers per token."""

    def bits(self, format: Format) -> float:
        """Return the bits that one token takes, with scales and zero points."""
        return self.values * bits_per_value(format, self.values // self.heads)


def find_caches(model: nn.Module, example: Any) -> list[CachedAttention]:
    """Find what a model keeps in its key-value cache, in one forward pass.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The attentions in the order of their calls.

    Raises:
        UserError: The model keeps no cache, or reads it with operations other than products or PyTorch's attention.
    """
    what = f"--quantize_kv_cache: {type(getattr(model, 'model', model)).__name__}"
    read, output = trace_cached(model, _with_cache(model, example, what))
    stored = _stored(output)
    if stored is None:
        raise UserError(f"{what} keeps no cache of keys and values: it is no decoder")
    found: dict[str, list[str]] = {}
    for site in read:
        module = site.partition(":")[0].replace("/", ".")
        found.setdefault(f"{module}.{CACHE_NAME}".lstrip("."), []).append(site)
    if len(found) != len(stored) or any(len(sites) != 2 for sites in found.values()):
        raise UserError(f"{what} has {len(stored)} caches of keys and values, {len(found)} of which can be traced")
    pairs = zip((site for sites in found.values() for site in sites), (x for pair in stored for x in pair), strict=True)
    if any(read[site].shape[-1] != x.shape[-1] for site, x in pairs):
        raise UserError(f"{what} stores another thing than the keys and values that its attention reads")
    return [
        CachedAttention(name, tuple(sites), keys.shape[1] + values.shape[1], _per_token(keys) + _per_token(values))
        for (name, sites), (keys, values) in zip(found.items(), stored, strict=True)
    ]


def attach_caches(model: nn.Module, sites: Mapping[str, str], formats: Mapping[str, Format]) -> None:
    """Round what attentions read from their caches, in place; without other placements around layers.

    Args:
        model: The model.
        sites: Site -> name of its cache, from `sites_of` or `placed_sites`; other sites are left out.
        formats: Name of a cache -> its format.
    """
    attach_quantizers(model, {}, {site: name for site, name in sites.items() if is_cached(site)})
    for name, cache in caches_of(model).items():
        cache.set_formats(formats[name])


def describe_caches(model: nn.Module) -> dict[str, Any]:
    """Return the quantized caches of a model as JSON values, for `restore_caches`."""
    sites = {site: name for site, name in placed_sites(model).items() if is_cached(site)}
    return {"sites": sites, "formats": {name: cache.formats[0].name for name, cache in caches_of(model).items()}}


def restore_caches(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Quantize the caches of a model, in place, as `describe_caches` returned for another one."""
    formats = {name: parse_format(format) for name, format in described.get("formats", {}).items()}
    attach_caches(model, described.get("sites", {}), formats)


def sites_of(found: Iterable[CachedAttention]) -> dict[str, str]:
    """Return site -> name of its cache."""
    return {site: attention.name for attention in found for site in attention.sites}


def caches_of(model: nn.Module) -> dict[str, QuantCache]:
    """Return the quantized caches of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantCache)}


def _with_cache(model: nn.Module, example: Any, what: str) -> Any:
    forward = inspect.signature(model.forward).parameters
    if not isinstance(example, Mapping) or "use_cache" not in forward:
        raise UserError(f"{what} keeps no cache of keys and values: it is no decoder")
    return {**example, "use_cache": True}


def _stored(output: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Return keys and values, (B, heads, tokens, head_dim), of each layer that has a cache."""
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [(keys, values) for keys, values in pairs if isinstance(keys, Tensor) and isinstance(values, Tensor)]


def _per_token(x: Tensor) -> int:
    return int(x.shape[1] * x.shape[-1])
