"""Beyond the training length, figure 5 of the paper (arXiv 2312.06635), on a small model and text at hand.

Command    python train.py --config=configs/length.py --workdir=runs/length-gla
           python -m gla_jax.evaluate --workdir=runs/length-gla --by-position --batches=12 > gla.jsonl
           --config.model.mixer=retention or attention are the rivals, or mamba with --config.model.num_layers=8
           --config.model.intermediate_size=0; --config.data.segments=12 hands the state from
           segment to segment; --config.data.sequence_length=1024 --config.data.batch_size=8 trains at four times the
           length on as many tokens (evaluate with --bucket=256 --length=3072 then).
Hardware   one GPU
Time       training 18 s on an H100 that others used as well, after a minute and a half of compilation
Expect     nats per byte within the first 256 and beyond 2,048: GLA 1.11 and 1.10, RetNet 1.13 and 1.06, Mamba
           0.98 and 0.95, a Transformer 1.05 and 3.58; see docs/results.md

Bytes are the tokens: 256 of them in training, 3,072 in the evaluation.
"""

from gla_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 2000

    config.model.hidden_size = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.intermediate_size = 768

    config.data.corpus = "stdlib"
    config.data.sequence_length = 256
    config.data.batch_size = 32

    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-4
    config.optimizer.warmup_steps = 100

    config.eval.every = 500
    config.eval.batches = 16
    config.checkpoint.every = 1000
    return config
