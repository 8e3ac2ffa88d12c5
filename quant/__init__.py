"""Number formats, and modules that can switch between them.

from quant import calibrate, parse_format, quantize_model, set_formats
"""

from typing import TYPE_CHECKING

from quant.lazy import names_of, renamed

if TYPE_CHECKING:
    from quant.channel_groups import split_channels
    from quant.convert import calibrate, quantize_model, set_formats
    from quant.elastic.layers import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
    from quant.elastic.net import ElasticNet
    from quant.formats import Format, parse_format
    from quant.quant_utils import fake_quantize
    from quant.quantizers.quantizer import QuantizerConfig

__all__ = [
    "ElasticBatchNorm2d",
    "ElasticConv2d",
    "ElasticLinear",
    "ElasticNet",
    "Format",
    "QuantizerConfig",
    "calibrate",
    "fake_quantize",
    "parse_format",
    "quantize_model",
    "set_formats",
    "split_channels",
]

__getattr__ = names_of(
    __name__,
    {
        "quant.channel_groups": ["split_channels"],
        "quant.convert": ["calibrate", "quantize_model", "set_formats"],
        "quant.elastic.layers": ["ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear"],
        "quant.elastic.net": ["ElasticNet"],
        "quant.formats": ["Format", "parse_format"],
        "quant.quant_utils": ["fake_quantize"],
        "quant.quantizers.quantizer": ["QuantizerConfig"],
    },
)
renamed({"quant.export_onnx": "quant.export.onnx.export", "quant.export_packed": "quant.export.packed"})
