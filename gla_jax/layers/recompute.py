"""What a backward pass does again instead of remembering it."""

import functools

import jax

recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Wrap an elementwise function so that its gradient keeps the arguments and nothing in between.

Between two matrix products a layer has some ten elementwise steps. To redo them is nearly free; to store what each of
them needs, float32 copies among it, takes most of the memory and bandwidth of a layer.
"""
