"""The `torch_pagedkv` custom ops: one module a family, each with schema, fake, reference and public wrapper.

Importing this package defines the ops; `torch_pagedkv._native` adds the CPU and CUDA kernels.
"""

from ._library import REFERENCES, SCHEMAS
from .activation import bias_act, gelu_and_mul, silu_and_mul
from .attention import flash_attention, merge_attention_states, paged_attention
from .cache import copy_blocks, gather_cache, reshape_and_cache, swap_blocks
from .cascade import paged_attention_cascade
from .int4 import int4_dequantize, int4_linear, int4_repack
from .int8 import int8_dequantize, int8_linear, int8_repack
from .linear import linear
from .norm import add_rms_norm, layer_norm, rms_norm
from .q4k import q4k_dequantize, q4k_linear, q4k_repack
from .quantize import dequantize_sums, quantize_per_token, scaled_linear
from .rotary import rotary_and_cache, rotary_embedding
from .sampling import argmax, sample

__all__ = [
    "REFERENCES",
    "SCHEMAS",
    "add_rms_norm",
    "argmax",
    "bias_act",
    "copy_blocks",
    "dequantize_sums",
    "flash_attention",
    "gather_cache",
    "gelu_and_mul",
    "int4_dequantize",
    "int4_linear",
    "int4_repack",
    "int8_dequantize",
    "int8_linear",
    "int8_repack",
    "layer_norm",
    "linear",
    "merge_attention_states",
    "paged_attention",
    "paged_attention_cascade",
    "q4k_dequantize",
    "q4k_linear",
    "q4k_repack",
    "quantize_per_token",
    "reshape_and_cache",
    "rms_norm",
    "rotary_and_cache",
    "rotary_embedding",
    "sample",
    "scaled_linear",
    "silu_and_mul",
    "swap_blocks",
]
