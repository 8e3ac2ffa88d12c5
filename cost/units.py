"""Kinds of cost and their units, without torch: flags are checked against them before it is imported."""

from typing import Literal, TypeAlias

CostType: TypeAlias = Literal["memory", "compute"]
UNITS: dict[str, str] = {"memory": "MiB", "compute": "GBOPs"}
"""Kind of cost -> its unit: memory of the weights, bit operations per example."""
