"""Unfold modules that use several weights at once into layers that can be quantized one by one, in place.

Outputs stay the same up to float rounding, and state dicts are saved and loaded under the same names as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from quant.quant_experts import ExpertLinear

PROJECTIONS = "q_proj", "k_proj", "v_proj"


def unfold(model: nn.Module) -> nn.Module:
    """Turn weights that are used without calling a layer into layers of their own.

    `nn.MultiheadAttention` becomes four linear layers and their attention. Experts of transformers that hold their
    matrices in one tensor become an `ExpertLinear` per tensor. Subclasses of `nn.MultiheadAttention` with a forward of
    their own, and modules with parametrized weights, stay as they are. Packed parameters are split into new ones, so
    create the optimizer afterwards.

    Args:
        model: The model; changed in place.

    Returns:
        The same model.
    """
    divided: dict[int, list[nn.Parameter]] = {}
    for module in list(model.modules()):
        if is_attention(module):
            UnfoldedAttention.take(module, divided)
        elif is_experts(module):
            UnfoldedExperts.take(module)
    return model


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an `nn.MultiheadAttention` that can be unfolded."""
    own = isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnfoldedAttention)
    return own and type(module).forward is nn.MultiheadAttention.forward and not is_parametrized(module)


class _Unfolded(nn.Module):
    """Saves state dicts under the names of the original module; loads from these and from the layers' names."""

    def fold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the layers' tensors, in place, to those of the original module.

        Args:
            state: A state dict.
            prefix: Name of the module, with a dot behind unless it is empty.
        """
        raise NotImplementedError

    def unfold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Invert `fold_names`."""
        raise NotImplementedError

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state dict under the names of the original module."""
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        self.fold_names(state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.unfold_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def layer_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model under the names of its layers, also within unfolded modules."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Unfolded):
            module.unfold_names(state, f"{name}." if name else "")
    return state


class UnfoldedAttention(_Unfolded, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections are linear layers: q_proj, k_proj, v_proj and out_proj."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    @classmethod
    def take(cls, attention: Any, divided: dict[int, list[nn.Parameter]]) -> None:
        """Convert an `nn.MultiheadAttention` in place.

        Args:
            attention: The module.
            divided: id of a packed parameter -> its parts; shared by all calls, so that tied parameters stay tied.
        """

        def thirds(packed: nn.Parameter) -> list[nn.Parameter]:
            parts = [nn.Parameter(part.detach().clone(), packed.requires_grad) for part in packed.chunk(3)]
            return divided.setdefault(id(packed), parts)

        packed, bias = attention.in_proj_weight, attention.in_proj_bias
        own = [getattr(attention, f"{name}_weight") for name in PROJECTIONS]
        weights = own if packed is None else thirds(packed)
        biases = [None] * 3 if bias is None else thirds(bias)
        attention.__class__ = cls
        for name in ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS)):
            setattr(attention, name, None)
        attention._qkv_same_embed_dim = False  # keeps PyTorch's fast path from reading in_proj_weight
        for name, part, part_bias in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(attention, name, _linear(part, part_bias))
        attention.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        attention.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; arguments and results are those of `nn.MultiheadAttention.forward`.

        Args:
            query: (B, T, features); without `batch_first` (T, B, features); without a batch (T, features).
            key: As query, with S tokens.
            value: As key.
            key_padding_mask: (B, S); bool, True for padding, or float, added to the scores.
            need_weights: Whether to return the attention weights.
            attn_mask: (T, S) or (B * heads, T, S); bool, True where attention is not allowed, or float, added.
            average_attn_weights: Whether to average the returned weights over heads.
            is_causal: Hint that attn_mask is causal.

        Returns:
            The output, shaped as query, and the weights, (B, T, S) or (B, heads, T, S), or None.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint: attn_mask must hold the causal mask")
        single = query.dim() == 2
        batch_dim = 0 if self.batch_first or single else 1
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if single:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif batch_dim == 1:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _as_added(attn_mask, q.dtype)
        padding = _as_added(key_padding_mask, q.dtype)
        if mask is not None:  # (T, S) or (B * heads, T, S)
            mask = mask.view(-1, self.num_heads if mask.dim() == 3 else 1, *mask.shape[-2:])
        if self.bias_k is not None and self.bias_v is not None:
            rows = len(k), 1, -1
            k, v = torch.cat([k, self.bias_k.expand(rows)], 1), torch.cat([v, self.bias_v.expand(rows)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = k.shape[1] - key.shape[0 if single or batch_dim else 1]
        if mask is not None:
            mask = F.pad(mask, (0, added))
        if padding is not None:
            padding = F.pad(padding, (0, added))[:, None, None]
            mask = padding if mask is None else mask + padding
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, T, features)
        if single:
            mixed, weights = mixed[0], None if weights is None else weights[0]
        elif batch_dim == 1:
            mixed = mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def fold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Join the projections into in_proj_weight and in_proj_bias."""
        for kind in ("weight", "bias"):
            parts = [f"{prefix}{name}.{kind}" for name in PROJECTIONS]
            found = [state[part] for part in parts if part in state]
            if len(found) == 3 and len({part.shape[1:] for part in found}) == 1:
                state[f"{prefix}in_proj_{kind}"] = torch.cat(found)
                for part in parts:
                    del state[part]
        _rename(state, {f"{prefix}{name}.weight": f"{prefix}{name}_weight" for name in PROJECTIONS})

    def unfold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Invert `fold_names`."""
        for kind in ("weight", "bias"):
            if (packed := state.pop(f"{prefix}in_proj_{kind}", None)) is not None:
                parts = [f"{prefix}{name}.{kind}" for name in PROJECTIONS]
                state.update(zip(parts, packed.chunk(3), strict=True))
        _rename(state, {f"{prefix}{name}_weight": f"{prefix}{name}.weight" for name in PROJECTIONS})


def is_experts(module: Any) -> bool:
    """Whether a module has experts of transformers, as stacked tensors of matrices, that can be unfolded."""
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")) or isinstance(module, UnfoldedExperts):
        return False
    weights = [module._parameters.get(name) for name in _projections(module)]
    stacked = all(weight is not None and weight.dim() == 3 for weight in weights)
    return stacked and not is_parametrized(module) and not getattr(module, "_is_expert_parallel", False)


def _projections(experts: Any) -> tuple[str, str]:
    """Return the names of the two tensors of matrices: into the experts, and out of them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class UnfoldedExperts(_Unfolded):
    """Experts with an `ExpertLinear` in place of each tensor of matrices.

    A mixin of the experts' own class, which implements gate and activation.
    """

    own: ClassVar[type[nn.Module]]

    @staticmethod
    def take(experts: Any) -> None:
        """Convert a module of experts in place."""
        for name in _projections(experts):
            weight, bias = experts._parameters.pop(name), experts._parameters.pop(f"{name}_bias", None)
            setattr(experts, name, ExpertLinear(weight, bias, experts.is_transposed))
        experts.__class__ = _unfolded_class(type(experts))  # type: ignore[arg-type]
        experts.train(experts.training)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the mixture.

        Args:
            hidden_states: (tokens, features).
            top_k_index: Integers (tokens, k): the experts of each token.
            top_k_weights: (tokens, k): their weights.

        Returns:
            (tokens, features).
        """
        chosen = top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        into, out_of = (getattr(self, name) for name in _projections(self))
        inner = into(hidden_states.repeat_interleave(chosen, dim=0), experts)
        outer = out_of(self._apply_gate(inner) if self.has_gate else self.act_fn(inner), experts)
        if self.has_post_expert_norm:
            outer = self.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1, 1)
        return weighted.unflatten(0, (-1, chosen)).sum(1).to(hidden_states.dtype)

    def fold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the layers' weights and biases to those of the experts."""
        _rename(state, {new: old for old, new in self._names(prefix)})

    def unfold_names(self, state: dict[str, Any], prefix: str) -> None:
        """Invert `fold_names`."""
        _rename(state, dict(self._names(prefix)))

    def _names(self, prefix: str) -> list[tuple[str, str]]:
        names = [prefix + name for name in _projections(self)]
        return [*((name, f"{name}.weight") for name in names), *((f"{name}_bias", f"{name}.bias") for name in names)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle an instance of a dynamic class by its original class, since no module holds the class itself."""
        return _blank, (self.own,), self.__getstate__()


@cache
def _unfolded_class(own: type[nn.Module]) -> type[UnfoldedExperts]:
    return type(f"Unfolded{own.__name__}", (UnfoldedExperts, own), {"__module__": __name__, "own": own})


def _blank(own: type[nn.Module]) -> UnfoldedExperts:
    unfolded = _unfolded_class(own)  # type: ignore[arg-type]
    return unfolded.__new__(unfolded)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear layer that holds these parameters themselves."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _as_added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a bool mask to one that is added to scores: -inf where it is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _rename(state_dict: dict[str, Any], names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if old in state_dict:
            state_dict[new] = state_dict.pop(old)
