"""Elastic models: widths, kernels and depths that can be switched, and extraction of the chosen ones."""

from quant.elastic.layers import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
from quant.elastic.net import ElasticNet, StructureDecision

__all__ = ["ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear", "ElasticNet", "StructureDecision"]
