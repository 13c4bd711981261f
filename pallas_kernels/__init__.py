"""Sequence-mixing operations for JAX: arrays in, arrays out, each in several implementations behind one function."""

from pallas_kernels.gated_linear_attention.api import gated_linear_attention, gated_linear_attention_step

__all__ = ["gated_linear_attention", "gated_linear_attention_step"]
