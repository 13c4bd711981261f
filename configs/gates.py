"""What the forget gate is worth, table 4 of the paper (arXiv 2312.06635), on a small model and text at hand.

Command    python -m gla_jax.sweep --config=configs/gates.py --output=runs/gates.jsonl \\
               --over='model.mixer, model.mixers.linear_attention.gate, model.num_heads =
                       linear_attention:none:4, retention:none:4, linear_attention:scalar:4,
                       gla:none:4, gla:none:1, gla:none:8' --seeds=0,1,2
           No gate; one that is constant for each head; one number from the data for each head; GLA's, a number for each
           key channel, with 4, 1 and 8 heads. All have keys of half the width and values of the whole width.
Hardware   one GPU
Time       on an H100 22 to 46 s of training a point with half of the batch, 500 steps, a vocabulary of 8,192 and
           three seeds, beside other work; and compilation
Expect     then, training losses of 4.403, 3.793, 3.774, 3.792, 3.805, 3.771 in this order, seeds differing by up to
           0.03; on bytes, 1500 steps and one seed, of the first four 1.97, 0.76, 0.81, 0.78 (docs/results.md).
           The paper has, for 340M parameters and 7B tokens,
           training perplexities of 23.21, 16.55, 15.56, 14.77, 14.61, 15.29: in nats above GLA with 4 heads 0.452,
           0.114, 0.052, 0, -0.011, 0.035.

`loss` of the last evaluation is the mean of the last 200 steps, as in the table. Bytes are the tokens;
`python -m gla_jax.data.train_tokenizer` makes others.
"""

from gla_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 3000

    config.model.hidden_size = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    for mixer in ("retention", "linear_attention", "gla"):
        config.model.mixers[mixer].expand_k = 0.5
        config.model.mixers[mixer].expand_v = 1.0

    config.data.corpus = "site-packages"
    config.data.sequence_length = 1024
    config.data.batch_size = 32

    config.optimizer.learning_rate = 2e-3
    config.optimizer.final_learning_rate = 2e-4
    config.optimizer.warmup_steps = 200

    config.eval.every = 500
    config.eval.batches = 16
    config.checkpoint.every = 1000
    return config
