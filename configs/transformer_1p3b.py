"""Transformer++ (LLaMA) with 1364.3M parameters, a baseline of the GLA paper (arXiv 2312.06635, section 5.1).

24 layers of 4 D^2 for attention and 3 * 5632 D for the SwiGLU, D = 2048, two norms each, the last norm, and 32000 D
each for embedding and head. The paper does not name the heads: 32 of 64 channels, a usual choice.

Command    python -m gla_jax.data.prepare --help        (SlimPajama with Mistral's tokeniser, 32000 tokens)
           python train.py --config=configs/transformer_1p3b.py --workdir=runs/transformer-1p3b \\
               --config.data.path=slimpajama.tokens --config.data.tokenizer=mistral/tokenizer.json
Hardware   32 GPUs of 80 GB. Fewer devices: raise optimizer.accumulation_steps; more: mesh.data=-1, mesh.fsdp=8.
Time       not yet measured
Expect     not yet measured. The paper gives for this size, of its own run: WikiText perplexity 16.85, LAMBADA 13.44.
"""

from gla_jax.config import default_config


def get_config():
    config = default_config()
    config.steps = 47_684  # of 2,097,152 tokens: 100B

    config.model.mixer = "attention"
    config.model.hidden_size = 2048
    config.model.num_layers = 24
    config.model.num_heads = 32
    config.model.vocab_size = 32_000
    config.model.tie_embeddings = False
    config.model.remat = "full"

    config.data.path = "slimpajama.tokens"
    config.data.tokenizer = "mistral/tokenizer.json"
    config.data.held_out = 0.0002
    config.data.sequence_length = 2048
    config.data.batch_size = 1024

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 477  # 1B tokens
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.batches = 16
    return config
