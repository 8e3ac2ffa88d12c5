"""Rounding of weights by reconstruction of the layers' outputs, without training: GPTQ and AdaRound.

from quant.reconstruction.rounding import round_weights
"""
