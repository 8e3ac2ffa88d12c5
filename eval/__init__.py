"""From flags to results: data, models, runs, the launcher, reports and exports."""

from typing import TYPE_CHECKING

from quant.lazy import names_of

if TYPE_CHECKING:
    from eval.packed_model import load_packed
    from eval.saved_model import load_model

__all__ = [
    "load_model",
    "load_packed",
]

__getattr__ = names_of(
    __name__,
    {
        "eval.packed_model": ["load_packed"],
        "eval.saved_model": ["load_model"],
    },
)
