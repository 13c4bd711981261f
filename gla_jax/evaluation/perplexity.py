"""How well a model predicts held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gla_jax.parallel.mesh import place_batch

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


def evaluate(
    eval_step: EvalStep, params: Any, batches: Iterable[dict[str, Any]], *, batch_size: int, bytes_per_token: float
) -> dict[str, float]:
    """Score held-out batches.

    Args:
        eval_step: of `gla_jax.training.step.make_eval_step`.
        params: of the model.
        batches: dicts of arrays [b, T], this process's part of the rows.
        batch_size: rows of all processes together.
        bytes_per_token: of the held-out text.

    Returns:
        "eval/loss" in nats per token, "eval/perplexity", its exponential, "eval/bits_per_byte", which can be compared
        across tokenisers, and "eval/accuracy", the share of tokens that were the likeliest.
    """
    nll = weight = correct = 0.0  # float64, whatever the number of batches

    def add(sums: dict[str, jax.Array]) -> None:
        nonlocal nll, weight, correct
        fetched = jax.device_get(sums)
        nll, weight = nll + float(fetched["nll"]), weight + float(fetched["weight"])
        correct += float(fetched["correct"])

    in_flight = None
    for batch in batches:
        dispatched = eval_step(params, place_batch(batch, batch_size))
        if in_flight is not None:  # devices never wait for the host, which is one batch ahead
            add(in_flight)
        in_flight = dispatched
    if in_flight is not None:
        add(in_flight)
    loss = nll / weight
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": loss / math.log(2) / bytes_per_token,
        "eval/accuracy": correct / weight,
    }
