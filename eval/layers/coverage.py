"""Selects the layers of a model that are quantized: all of them, except those that flags exclude."""

from __future__ import annotations

from typing import Any

from torch import nn

from eval.layers.roles import ROLES, layer_roles
from eval.tasks import Kind
from quant.convert import find_layers
from quant.errors import UserError

OFF_FOR_TEXT = ("pooler", "classifier")
"""roles that stay in float in text models unless flags enable them: small layers, to which accuracy is sensitive"""
WHOLE_FILE = "file"
"""value of `--cost_scope` under which embeddings and the head are quantized, too"""


def role_enabled(role: str | None, kind: Kind, config: Any) -> bool:
    """Return whether `--quantize_<role>` is on, by flag or by default; True for layers without a role."""
    if role is None:
        return True
    wanted = getattr(config, f"quantize_{role}", None)
    if wanted is None and role == "classifier" and takes_file(config):
        return True
    return (kind == "image" or role not in OFF_FOR_TEXT) if wanted is None else wanted


def takes_file(config: Any) -> bool:
    """Return whether the cost is of the whole file, so that embeddings are layers, and the head is one by default."""
    return getattr(config, "cost_scope", None) == WHOLE_FILE


def searched_layers(model: nn.Module, kind: Kind, config: Any) -> list[str]:
    """Return the names of the layers to quantize, in module order.

    Args:
        model: the float model.
        kind: the kind of the task; text models leave more roles in float by default.
        config: has `quantize_<role>` for the roles of `layer_roles`, `include` and `exclude`, comma lists of globs, and
            `cost_scope`.

    Raises:
        UserError: if a glob matches no layer, or no layer is left.
    """
    globs = {flag: split_globs(getattr(config, flag, None)) for flag in ("include", "exclude")}
    for flag, patterns in globs.items():
        try:
            find_layers(model, include=patterns, tables=takes_file(config))
        except ValueError as error:
            raise UserError(f"--{flag}: {error}") from None
    candidates = find_layers(model, **globs, tables=takes_file(config))
    roles = layer_roles(model)  # embeddings have none
    names = [name for name in candidates if role_enabled(roles.get(name), kind, config)]
    if not names:
        off = [f"--no_quantize_{role}" for role in ROLES if not role_enabled(role, kind, config)]
        raise UserError(f"no layer is left to quantize: {len(roles)} layers, minus {', '.join(off) or '--exclude'}")
    return names


def split_globs(text: str | None) -> list[str] | None:
    """Split a comma list of globs; None for an empty or missing one."""
    return [glob.strip() for glob in text.split(",") if glob.strip()] if text else None
