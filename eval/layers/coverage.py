"""Which layers of a model are quantized: all of them, minus what the flags name."""

from __future__ import annotations

from typing import Any

from torch import nn

from eval.layers.roles import ROLES, layer_roles
from eval.tasks import Kind
from quant.convert import find_layers
from quant.errors import UserError

OFF_FOR_TEXT = ("pooler", "classifier")
"""roles that stay in float unless asked for: small layers of a text model, on which its accuracy hangs"""


def role_enabled(role: str | None, kind: Kind, config: Any) -> bool:
    """Whether `--quantize_<role>` is on, by flag or by default; layers without a role always are."""
    if role is None:
        return True
    wanted = getattr(config, f"quantize_{role}", None)
    return (kind == "image" or role not in OFF_FOR_TEXT) if wanted is None else wanted


def searched_layers(model: nn.Module, kind: Kind, config: Any) -> list[str]:
    """Names of the layers to quantize, in module order; see `layer_roles` for what each flag covers.

    `config.include` and `config.exclude` are comma lists of globs. UserError where a glob matches nothing or no layer
    is left.
    """
    globs = {flag: split_globs(getattr(config, flag, None)) for flag in ("include", "exclude")}
    for flag, patterns in globs.items():
        try:
            find_layers(model, include=patterns)
        except ValueError as error:
            raise UserError(f"--{flag}: {error}") from None
    candidates = find_layers(model, **globs)
    roles = layer_roles(model)
    names = [name for name in candidates if role_enabled(roles[name], kind, config)]
    if not names:
        off = [f"--no_quantize_{role}" for role in ROLES if not role_enabled(role, kind, config)]
        raise UserError(f"no layer is left to quantize: {len(roles)} layers, minus {', '.join(off) or '--exclude'}")
    return names


def split_globs(text: str | None) -> list[str] | None:
    """The globs of a comma list; None where there is none."""
    return [glob.strip() for glob in text.split(",") if glob.strip()] if text else None
