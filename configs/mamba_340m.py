"""Mamba with 352.8M parameters, a baseline of the GLA paper (arXiv 2312.06635, section 5.1).

The authors' size "350M": 48 blocks without an MLP, D = 1024, E = 2048 inner channels, N = 16, R = 64. A block
has 3 D E for its maps in and out, (2 R + 2 N) E for the selection, (N + 4 + 3) E for A, the convolution and
its bias, D and the bias of the step sizes, and a norm; then a norm, and 32000 D for the tied embedding.

Command    python -m gla_jax.data.prepare --help        (SlimPajama with Mistral's tokeniser, 32000 tokens)
           python train.py --config=configs/mamba_340m.py --workdir=runs/mamba-340m \\
               --config.data.path=slimpajama.tokens --config.data.tokenizer=mistral/tokenizer.json
Hardware   8 GPUs of 80 GB. Fewer devices: raise optimizer.accumulation_steps; more: mesh.data=-1, mesh.fsdp=8.
Time       not yet measured
Expect     not yet measured. The paper gives for this size, of its own run: WikiText perplexity 28.39, LAMBADA 39.66.
"""

from gla_jax.config import default_config


def get_config():
    config = default_config()
    config.steps = 28_610  # of 524,288 tokens: 15B

    config.model.mixer = "mamba"
    config.model.hidden_size = 1024
    config.model.intermediate_size = 0
    config.model.num_layers = 48
    config.model.norm_eps = 1e-5
    config.model.vocab_size = 32_000
    config.model.tie_embeddings = True
    config.model.remat = "full"

    config.data.path = "slimpajama.tokens"
    config.data.tokenizer = "mistral/tokenizer.json"
    config.data.held_out = 0.001
    config.data.sequence_length = 2048
    config.data.batch_size = 256

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 954  # 0.5B tokens
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.batches = 16
    return config
