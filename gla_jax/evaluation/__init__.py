"""Evaluation: how well a model predicts text that it has not seen."""

from gla_jax.evaluation.by_position import evaluate_by_position
from gla_jax.evaluation.perplexity import EvalStep, evaluate

__all__ = ["EvalStep", "evaluate", "evaluate_by_position"]
