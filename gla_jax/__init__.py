"""Gated Linear Attention (arXiv 2312.06635) in JAX: layers, models, data, training, evaluation, sampling."""
