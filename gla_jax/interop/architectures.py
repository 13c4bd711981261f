"""What fla and transformers call things: for every architecture its names of config fields and tensors. Data only.

A tensor's name is given for the path of our parameter; in a layer's, `{}` stands for the layer's number. Where versions
of a library differ there are several names, of which the first whose tensor fits is read and the first is written; a
name that ends in [0/2] is the first half of a tensor's rows. How numbers are laid out follows from our path: kernels
are transposed, taps [W, C] are [C, 1, W] there, all else is the same.
"""

import dataclasses
from typing import Any

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of Hugging Face directory."""

    model_type: str
    class_name: str
    mixer: str
    """Our mixer."""
    fields: dict[str, tuple[Names, Any]]
    """Our config field: its names there, and what it is where config.json leaves it out."""
    required: dict[str, tuple[Any, ...]]
    """Fields that must have one of these values, the first of which is written."""
    tensors: dict[str, Names]
    """Outside the layers."""
    layers: dict[str, dict[str, Names]]
    """In a layer, by its mixer."""
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Our config fields that the architecture has no choice of."""
    adjustments: dict[str, str] = dataclasses.field(default_factory=dict)
    """Parameters of ours whose numbers are not theirs alone, and how they are made of them."""
    hidden_ratio: float | None = None
    """What a missing intermediate_size is made of if config.json has no hidden_ratio either; None: it must be there."""


IGNORED = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "model_type", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "_name_or_path", "_attn_implementation_autoset", "auto_map",
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
    "output_attentions", "output_hidden_states", "return_dict", "pretraining_tp", "attention_dropout", "hidden_ratio",
    "problem_type", "id2label", "label2id", "is_encoder_decoder", "chunk_size_feed_forward", "max_position_embeddings",
    "context_length", "rope_theta", "rope_parameters", "attn", "n_layer", "load_from_llama",
}  # fmt: skip
"""Fields that change no number, or are read by code of their own. Others that no table knows are refused if set."""

IGNORED_TENSORS = ("inv_freq", "masked_bias")
"""Endings of names of constants that old versions stored."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""What is copied along, either way. Of these, the first or else the second is what we read."""

_MODEL: dict[str, Names] = {
    "embed/embedding": ("model.embeddings.weight",),
    "norm/scale": ("model.norm.weight",),
    "head/kernel": ("lm_head.weight",),
}
_BLOCK: dict[str, Names] = {
    "mixer_norm/scale": ("model.layers.{}.attn_norm.weight",),
    "mlp_norm/scale": ("model.layers.{}.mlp_norm.weight",),
    # Files from before February 2025 hold gate and up in one.
    "mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.gate_proj.weight[0/2]"),
    "mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.gate_proj.weight[1/2]"),
    "mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight",),
}
_ATTENTION: dict[str, Names] = _BLOCK | {
    "mixer/query/kernel": ("model.layers.{}.attn.q_proj.weight",),
    "mixer/key/kernel": ("model.layers.{}.attn.k_proj.weight",),
    "mixer/value/kernel": ("model.layers.{}.attn.v_proj.weight",),
    "mixer/output/kernel": ("model.layers.{}.attn.o_proj.weight",),
    "mixer/query/bias": ("model.layers.{}.attn.q_proj.bias",),
    "mixer/key/bias": ("model.layers.{}.attn.k_proj.bias",),
    "mixer/value/bias": ("model.layers.{}.attn.v_proj.bias",),
}
_RECURRENT: dict[str, Names] = _BLOCK | {
    "mixer/query/kernel": ("model.layers.{}.attn.q_proj.weight",),
    "mixer/key/kernel": ("model.layers.{}.attn.k_proj.weight",),
    "mixer/value/kernel": ("model.layers.{}.attn.v_proj.weight",),
    "mixer/output/kernel": ("model.layers.{}.attn.o_proj.weight",),
    "mixer/output_gate/kernel": ("model.layers.{}.attn.g_proj.weight",),
    # The first where norm and output gate are one kernel; that is what a config that we write says.
    "mixer/output_norm/scale": (
        "model.layers.{}.attn.g_norm_swish_gate.weight",
        "model.layers.{}.attn.g_norm.weight",
    ),
}
_GLA: dict[str, Names] = _RECURRENT | {
    "mixer/forget_gate_down/kernel": ("model.layers.{}.attn.gk_proj.0.weight",),
    "mixer/forget_gate_up/kernel": ("model.layers.{}.attn.gk_proj.1.weight",),
    "mixer/forget_gate_up/bias": ("model.layers.{}.attn.gk_proj.1.bias",),
    "mixer/convolutions/query/taps": ("model.layers.{}.attn.q_conv1d.weight",),
    "mixer/convolutions/key/taps": ("model.layers.{}.attn.k_conv1d.weight",),
    "mixer/convolutions/value/taps": ("model.layers.{}.attn.v_conv1d.weight",),
}
_LLAMA: dict[str, Names] = {
    "mixer_norm/scale": ("model.layers.{}.input_layernorm.weight",),
    "mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight",),
    "mixer/query/kernel": ("model.layers.{}.self_attn.q_proj.weight",),
    "mixer/key/kernel": ("model.layers.{}.self_attn.k_proj.weight",),
    "mixer/value/kernel": ("model.layers.{}.self_attn.v_proj.weight",),
    "mixer/output/kernel": ("model.layers.{}.self_attn.o_proj.weight",),
    "mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight",),
    "mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight",),
    "mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight",),
}
_ORIGINAL: dict[str, Names] = {
    "mixer_norm/scale": ("transformer.h.{}.ln_1.weight",),
    "mlp_norm/scale": ("transformer.h.{}.ln_2.weight",),
    "mixer/query/kernel": ("transformer.h.{}.attn.q_proj.weight",),
    "mixer/key/kernel": ("transformer.h.{}.attn.k_proj.weight",),
    "mixer/value/kernel": ("transformer.h.{}.attn.v_proj.weight",),
    "mixer/output/kernel": ("transformer.h.{}.attn.out_proj.weight",),
    "mixer/output_gate/kernel": ("transformer.h.{}.attn.g_proj.weight",),
    "mixer/output_gate/bias": ("transformer.h.{}.attn.g_proj.bias",),
    "mixer/forget_gate_down/kernel": ("transformer.h.{}.attn.k_gate.0.weight",),
    "mixer/forget_gate_up/kernel": ("transformer.h.{}.attn.k_gate.1.weight",),
    "mixer/forget_gate_up/bias": ("transformer.h.{}.attn.k_gate.1.bias",),
    "mlp/gate/kernel": ("transformer.h.{}.w1.weight",),
    "mlp/up/kernel": ("transformer.h.{}.w3.weight",),
    "mlp/down/kernel": ("transformer.h.{}.w2.weight",),
}

_FLA_FIELDS: dict[str, tuple[Names, Any]] = {
    "model.hidden_size": (("hidden_size",), 2048),
    "model.num_layers": (("num_hidden_layers",), 24),
    "model.vocab_size": (("vocab_size",), 32_000),
    "model.tie_embeddings": (("tie_word_embeddings",), False),
    "model.intermediate_size": (("intermediate_size",), None),
    "model.norm_eps": (("norm_eps", "rms_norm_eps"), 1e-6),
    "model.initializer_range": (("initializer_range",), 0.02),
}
_FLA_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
}
_LLAMA_FIELDS: dict[str, tuple[Names, Any]] = {
    "model.hidden_size": (("hidden_size",), 4096),
    "model.num_layers": (("num_hidden_layers",), 32),
    "model.num_heads": (("num_attention_heads",), 32),
    "model.vocab_size": (("vocab_size",), 32_000),
    "model.tie_embeddings": (("tie_word_embeddings",), False),
    "model.norm_eps": (("rms_norm_eps",), 1e-6),
    "model.initializer_range": (("initializer_range",), 0.02),
}
_LLAMA_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
}
_LLAMA_TENSORS: dict[str, Names] = _MODEL | {"embed/embedding": ("model.embed_tokens.weight",)}

ARCHITECTURES = {
    "gla": Architecture(
        model_type="gla",
        class_name="GLAForCausalLM",
        mixer="gla",
        fields=_FLA_FIELDS
        | {
            "model.num_heads": (("num_heads",), 4),
            "model.mixers.gla.num_kv_heads": (("num_kv_heads",), None),
            "model.mixers.gla.expand_k": (("expand_k",), 0.5),
            "model.mixers.gla.expand_v": (("expand_v",), 1.0),
            "model.mixers.gla.feature_map": (("feature_map",), None),
            "model.mixers.gla.use_short_conv": (("use_short_conv",), False),
            "model.mixers.gla.conv_size": (("conv_size",), 4),
            "model.mixers.gla.use_output_gate": (("use_output_gate",), True),
            "model.mixers.gla.clamp_min": (("clamp_min",), None),
            "model.mixers.gla.elementwise_affine": (("elementwise_affine",), True),
        },
        required=_FLA_REQUIRED | {"use_gk": (True,), "use_gv": (False,), "share_conv_kernel": (None, False)},
        tensors=_MODEL,
        layers={"gla": _GLA, "attention": _ATTENTION},
        hidden_ratio=4,
    ),
    "retnet": Architecture(
        model_type="retnet",
        class_name="RetNetForCausalLM",
        mixer="retention",
        fields=_FLA_FIELDS
        | {
            "model.num_heads": (("num_heads",), 8),
            "model.mixers.retention.num_kv_heads": (("num_kv_heads",), None),
            "model.mixers.retention.expand_k": (("expand_k",), 1.0),
            "model.mixers.retention.expand_v": (("expand_v",), 2.0),
            "model.mixers.retention.feature_map": (("feature_map",), None),
            "model.mixers.retention.use_output_gate": (("use_output_gate",), True),
            "model.mixers.retention.elementwise_affine": (("elementwise_affine",), True),
        },
        # fla's RetNet reads use_short_conv and conv_size and makes no convolution of them.
        required=_FLA_REQUIRED | {"use_short_conv": (False, True), "conv_size": (4, *range(1, 4), *range(5, 65))},
        tensors=_MODEL,
        layers={"retention": _RECURRENT, "attention": _ATTENTION},
        hidden_ratio=2,
    ),
    "transformer": Architecture(
        model_type="transformer",
        class_name="TransformerForCausalLM",
        mixer="attention",
        fields=_FLA_FIELDS
        | {
            "model.num_heads": (("num_heads",), 32),
            "model.mixers.attention.num_kv_heads": (("num_kv_heads",), None),
            "model.mixers.attention.qkv_bias": (("qkv_bias",), False),
            "model.mixers.attention.window": (("window_size",), None),
            "model.mixers.attention.rotary_base": (("rope_theta",), 10_000.0),
        },
        # elementwise_affine is read and not used there.
        required=_FLA_REQUIRED | {"qk_norm": (False,), "elementwise_affine": (True, False)},
        tensors=_MODEL,
        layers={"attention": _ATTENTION},
        hidden_ratio=4,
    ),
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        mixer="attention",
        fields=_LLAMA_FIELDS
        | {
            "model.intermediate_size": (("intermediate_size",), 11_008),
            "model.mixers.attention.num_kv_heads": (("num_key_value_heads",), None),
            "model.mixers.attention.rotary_base": (("rope_theta",), 10_000.0),
        },
        required=_LLAMA_REQUIRED,
        tensors=_LLAMA_TENSORS,
        layers={"attention": _LLAMA},
    ),
    "mistral": Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        mixer="attention",
        fields=_LLAMA_FIELDS
        | {
            "model.intermediate_size": (("intermediate_size",), 14_336),
            "model.mixers.attention.num_kv_heads": (("num_key_value_heads",), 8),
            "model.mixers.attention.rotary_base": (("rope_theta",), 10_000.0),
            "model.mixers.attention.window": (("sliding_window",), 4096),
        },
        required=_LLAMA_REQUIRED,
        tensors=_LLAMA_TENSORS,
        layers={"attention": _LLAMA},
    ),
    # The format of the paper's own code, https://github.com/berlino/gated_linear_attention; read, not written.
    "gla-original": Architecture(
        model_type="gla",
        class_name="GLAForCausalLM",
        mixer="gla",
        fields={
            "model.hidden_size": (("d_model",), 2048),
            "model.num_layers": (("n_layer",), 24),
            "model.num_heads": (("n_head",), 8),
            "model.vocab_size": (("vocab_size",), 50_432),
            "model.tie_embeddings": (("tie_word_embeddings",), False),
        },
        required={"use_gk": (True,), "use_gv": (False,)},
        tensors={
            "embed/embedding": ("transformer.wte.weight",),
            "norm/scale": ("transformer.ln_f.weight",),
            "head/kernel": ("lm_head.weight",),
        },
        layers={"gla": _ORIGINAL},
        constants={
            "model.norm_eps": 1e-5,
            "model.mixers.gla.elementwise_affine": False,
            "model.mixers.gla.output_gate_bias": True,
        },
        adjustments={"mixer/key/kernel": "scale_keys", "mixer/value/kernel": "center_values"},
        hidden_ratio=4,
    ),
}
"""By model_type, but for the original GLA, which shares the name with fla's and is known by its field d_model."""
