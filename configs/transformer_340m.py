"""Transformer++ (LLaMA) with 341.1M parameters, a baseline of the GLA paper (arXiv 2312.06635, section 5.1).

24 layers of 4 D^2 for attention and 3 * 2816 D for the SwiGLU, D = 1024, two norms each, the last norm, and the
32000 D of the embedding, which is the head too. The paper does not name the heads: 16 of 64 channels, a usual choice.

Command    python -m gla_jax.data.prepare --help        (SlimPajama with Mistral's tokeniser, 32000 tokens)
           python train.py --config=configs/transformer_340m.py --workdir=runs/transformer-340m \\
               --config.data.path=slimpajama.tokens --config.data.tokenizer=mistral/tokenizer.json
Hardware   8 GPUs of 80 GB. Fewer devices: raise optimizer.accumulation_steps; more: mesh.data=-1, mesh.fsdp=8.
Time       not yet measured
Expect     not yet measured. The paper gives for this size, of its own run: WikiText perplexity 28.39, LAMBADA 42.69.
"""

from gla_jax.config import default_config


def get_config():
    config = default_config()
    config.steps = 28_610  # of 524,288 tokens: 15B

    config.model.mixer = "attention"
    config.model.hidden_size = 1024
    config.model.num_layers = 24
    config.model.num_heads = 16
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
