"""Gated Linear Attention (arXiv 2312.06635): one recurrence, several ways of computing it."""

from pallas_kernels.gated_linear_attention.api import (
    IMPLEMENTATIONS,
    gated_linear_attention,
    gated_linear_attention_step,
    gated_linear_attention_support,
)

__all__ = [
    "IMPLEMENTATIONS",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_linear_attention_support",
]
