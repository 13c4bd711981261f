"""Multi-query associative recall, figure 4 of the paper (arXiv 2312.06635), with the settings of Zoology (2312.04927).

Command    python train.py --config=configs/mqar.py:512 --workdir=runs/mqar-512-64-gla \\
               --config.model.hidden_size=64 --config.optimizer.learning_rate=4.64e-4
           The text after the colon is the length: 64, 128, 256 or 512 tokens with 4, 8, 16 or 64 pairs. A point of the
           figure is the best of the learning rates 1e-4, 4.64e-4, 2.15e-3, 1e-2; hidden sizes are 64, 128, 256, 512;
           --config.model.mixer=attention, retention, mamba or linear_attention are the rivals.
           `python -m gla_jax.sweep` trains the learning rates of a point at once and stops at an accuracy; see
           docs/experiments.md.
Hardware   one GPU
Time       on an H100 2.4 ms a step for GLA of width 128 at 512 tokens, one learning rate: two minutes for the 64 epochs
Expect     so far (docs/results.md): attention 0.99 in a few epochs. GLA at 512 tokens 0.21 at width 64, 0.967 at 128
           with 4.64e-4, half_life_skew=2 and optimizer.decayed=all, 0.999 at 256 with 1e-4 in 13 epochs of 24, 1.000 at
           512 with 2.15e-4 in 11 of 16; it leaves chance in the second to tenth, and one of several models goes so far.
           At 256 tokens and width 64 it has 0.94 with 1e-3, half_life_skew=4 and gate_logit_normalizer=256. With a
           learning rate of 2.15e-3 Mamba of width 128 has 0.98 at 256 tokens after 15 epochs, 0.90 at 512 after 25,
           RetNet 0.87 at 256 tokens after 18.
           The paper's figure, read off to about 1 point, has for GLA eval/accuracy 0.99 at 256 everywhere, and 0.22,
           0.95, 1.00, 1.00 at 512.

Unlike the paper: the channels of a new model's states forget half of them in 1 to 4096 tokens, and not all in 16. What
tells a value's key is the token before it, but a key comes again 187 tokens after it was given, on average; of what it
wrote, a model that forgets half every 16 tokens has 1.3 % left by then.

Unlike Zoology: RMSNorm and not LayerNorm, nothing added for the MLP that is not there (it adds LN(x) to x), no weight
decay of embeddings and norms (--config.optimizer.decayed=all has it), rotary and not learned positions for attention, a
cosine by step and not by epoch, and all 64 epochs even where an accuracy of 0.99 comes earlier.
"""

from gla_jax.config import ConfigDict, ConfigError, default_config

_PAIRS_AND_BATCH_SIZE = {"64": (4, 512), "128": (8, 512), "256": (16, 256), "512": (64, 128)}


def get_config(length: str = "256") -> ConfigDict:
    if length not in _PAIRS_AND_BATCH_SIZE:
        raise ConfigError(f"configs/mqar.py:{length} must end in one of {', '.join(_PAIRS_AND_BATCH_SIZE)}.")
    config = default_config()

    config.data.corpus = "mqar"
    config.data.sequence_length = int(length)
    config.data.pairs, config.data.batch_size = _PAIRS_AND_BATCH_SIZE[length]
    epoch = -(-100_000 // config.data.batch_size)
    config.steps = 64 * epoch

    config.model.hidden_size = 128
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.vocab_size = 8192
    config.model.intermediate_size = 0
    config.model.embedding_dropout = 0.1
    config.model.mixers.gla.longest_half_life = 4096.0

    config.optimizer.learning_rate = 2.15e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 0.0

    config.eval.every = epoch
    config.eval.batches = 0
    config.checkpoint.every = 8 * epoch
    config.log.every = 100
    return config
