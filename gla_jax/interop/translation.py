"""From a Hugging Face config.json to our config and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gla_jax.config import Config, ConfigError, as_dict, build, default_config, flat
from gla_jax.interop.architectures import ARCHITECTURES, IGNORED, TOKENIZER_FILES, Architecture
from gla_jax.layers.mlp import default_intermediate_size
from gla_jax.models.language_model import layer_mixers

_ROWS = 2048
_UNUSED_OPTIONS = ("implementation", "chunk_size", "cache_length", "longest_half_life", "half_life_skew")
"""Options of mixers that say how something is computed, or how it begins, not what."""
_NOT_SET: tuple[Any, ...] = (None, False, [], {}, "")


def is_hugging_face(folder: Path) -> bool:
    """Say whether a folder's config.json is of Hugging Face's kind."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: Path) -> tuple[Config, Architecture]:
    """Translate the config.json of a Hugging Face directory.

    Args:
        folder: the directory.

    Returns:
        Our config, whose number formats are still the defaults, and the architecture.

    Raises:
        ConfigError: there is no such file, or it asks for what our layers do not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face directory: it has no config.json.")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}.") from None
    if isinstance(theirs, dict) and {"model", "data", "steps"} <= theirs.keys():
        raise ConfigError(f"{folder} is the folder of a run of gla-jax already, which needs no import.")
    if not isinstance(theirs, dict) or "model_type" not in theirs:
        raise ConfigError(f"{path} has no model_type, so it is not the config of a Hugging Face model.")
    kind = theirs["model_type"]
    if kind == "gla" and "d_model" in theirs:
        kind = "gla-original"
    if kind not in ARCHITECTURES:
        raise ConfigError(f"{path} has model_type={kind!r}; {', '.join(ARCHITECTURES)} are read.")
    architecture = ARCHITECTURES[kind]
    theirs = _with_rotary_base(path, theirs)
    _check_fields(path, theirs, architecture)

    ours: dict[str, Any] = dict(architecture.constants)
    for name, (names, default) in architecture.fields.items():
        ours[name] = next((theirs[known] for known in names if known in theirs), default)
    if ours.get("model.intermediate_size") is None:
        if architecture.hidden_ratio is None:
            raise ConfigError(f"{path} has no intermediate_size.")
        ratio = theirs.get("hidden_ratio") or architecture.hidden_ratio
        ours["model.intermediate_size"] = 256 * -(-int(ours["model.hidden_size"] * ratio * 2 / 3) // 256)
    ours["model.mixer"] = architecture.mixer
    context = theirs.get("max_position_embeddings") or theirs.get("context_length") or _ROWS
    ours["data.sequence_length"] = min(context, _ROWS)  # rows as long as the context of some models would fit nowhere
    ours["data.tokenizer"] = str(folder / _tokenizer_file(folder))
    if theirs.get("attn") is not None:
        ours |= _read_hybrid(path, theirs["attn"], ours, architecture)
    ours["model.mixers.attention.cache_length"] = context
    settings: dict[str, Any] = {}
    for name, value in ours.items():
        *sections, field = name.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    try:
        return build(settings), architecture
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be made into a model: {error}") from None


def write_config(config: Config, kind: str, dtype: str) -> dict[str, Any]:
    """Translate a config of ours into the contents of a config.json.

    Args:
        config: ours; `model.vocab_size` must be set.
        kind: a name in `ARCHITECTURES`.
        dtype: of the tensors.

    Returns:
        The fields, by name.

    Raises:
        ConfigError: the model has something that the architecture has not.
    """
    architecture, model = ARCHITECTURES[kind], config.model
    if kind == "gla-original":
        raise ConfigError("The format gla-original is read and not written; use gla.")
    mixers = layer_mixers(model)
    if unknown := sorted(set(mixers) - set(architecture.layers)):
        raise ConfigError(
            f"A {kind} has no layers of model.mixer={unknown[0]!r}, only {', '.join(architecture.layers)}."
        )
    if architecture.mixer not in mixers:
        raise ConfigError(f"A {kind} has layers of {architecture.mixer}, and model.mixer={model.mixer!r} names none.")
    values, defaults = flat(config), flat(build(default_config()))
    theirs: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": dtype,
    }
    for name, (names, _) in architecture.fields.items():
        theirs[names[0]] = values[name]
    theirs |= {name: allowed[0] for name, allowed in architecture.required.items() if allowed[0] is not None}
    if model.intermediate_size == 0:
        raise ConfigError(f"A {kind} has an MLP in every layer, and model.intermediate_size=0 means none.")
    theirs["intermediate_size"] = model.intermediate_size or default_intermediate_size(model.hidden_size)
    theirs["max_position_embeddings"] = config.data.sequence_length
    if "attention" in mixers:
        theirs["max_position_embeddings"] = values["model.mixers.attention.cache_length"]
    placed = set(architecture.fields)
    if architecture.mixer != "attention" and "attention" in mixers:
        attention = model.mixers["attention"]
        theirs["attn"] = {
            "layers": [layer for layer, mixer in enumerate(mixers) if mixer == "attention"],
            "num_heads": model.num_heads,
            "num_kv_heads": attention.num_kv_heads or model.num_heads,
            "qkv_bias": attention.qkv_bias,
            "window_size": attention.window,
            "rope_theta": attention.rotary_base,
        }
        placed |= {f"model.mixers.attention.{field.name}" for field in dataclasses.fields(attention)}
    for mixer in set(mixers):
        for field in dataclasses.fields(model.mixers[mixer]):
            name = f"model.mixers.{mixer}.{field.name}"
            if name not in placed and field.name not in _UNUSED_OPTIONS and values[name] != defaults[name]:
                raise ConfigError(f"A {kind} has no place for {name}={values[name]!r}; it must be {defaults[name]!r}.")
    if "rope_theta" in theirs and kind in ("llama", "mistral"):  # once for either side of transformers 5
        theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": theirs["rope_theta"]}
    if theirs.get("num_key_value_heads", 0) is None:
        theirs["num_key_value_heads"] = model.num_heads
    return theirs


def with_formats(config: Config, params: str, compute: str) -> Config:
    """Return the config with these number formats."""
    return build(as_dict(config) | {"dtype": {"params": params, "compute": compute}})


def _tokenizer_file(folder: Path) -> str:
    """Return the name of the tokeniser's file, or of the one that ought to be there."""
    return next((name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()), TOKENIZER_FILES[0])


def _with_rotary_base(path: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `rope_theta` outside of `rope_parameters`, where newer files have it."""
    for name in ("rope_parameters", "rope_scaling"):
        rotary: Any = theirs.get(name)
        if rotary in _NOT_SET:
            continue
        kind = rotary.get("rope_type", rotary.get("type")) if isinstance(rotary, dict) else rotary
        others = set(rotary) - {"rope_type", "type", "rope_theta"} if isinstance(rotary, dict) else set()
        if kind != "default" or others:
            raise ConfigError(f"{path} has {name}={rotary!r}; only plain rotary positions, 'default', are supported.")
        theirs = {**theirs, name: None} | ({"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {})
    return theirs


def _check_fields(path: Path, theirs: dict[str, Any], architecture: Architecture) -> None:
    """Raise ConfigError for a field that asks for what there is not, or that nothing here knows."""
    known = {name for names, _ in architecture.fields.values() for name in names} | IGNORED
    for name, value in theirs.items():
        if name in architecture.required:
            if value not in architecture.required[name]:
                choices = " or ".join(map(repr, architecture.required[name][:3]))
                raise ConfigError(f"{path} has {name}={value!r}, which is not supported; it must be {choices}.")
        elif name == "head_dim":
            heads = theirs.get("num_attention_heads")
            if value is not None and (not heads or value * heads != theirs.get("hidden_size")):
                raise ConfigError(
                    f"{path} has head_dim={value!r}, which is not supported unless it is hidden_size / "
                    f"num_attention_heads, {theirs.get('hidden_size')} / {heads}."
                )
        elif name not in known and value not in _NOT_SET:
            raise ConfigError(
                f"{path} has {name}={value!r}, which is not known here and may change what the model computes; "
                "remove it from the file if it does not."
            )


def _read_hybrid(path: Path, attn: Any, ours: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return our fields for fla's `attn`, the layers that have softmax attention instead."""
    specs = attn if isinstance(attn, list) else [attn]
    mixers = [architecture.mixer] * ours["model.num_layers"]
    settings = []
    for spec in specs:
        try:
            for layer in spec["layers"]:
                mixers[layer] = "attention"
            heads = spec["num_heads"]
        except (KeyError, TypeError, IndexError):
            raise ConfigError(
                f"{path} has attn={attn!r}, which does not say which layers with how many heads."
            ) from None
        if heads != ours["model.num_heads"]:
            raise ConfigError(
                f"{path} has attn.num_heads={heads} beside num_heads={ours['model.num_heads']}; layers of different "
                "numbers of heads are not supported."
            )
        settings.append(
            {
                "model.mixers.attention.num_kv_heads": spec.get("num_kv_heads"),
                "model.mixers.attention.qkv_bias": spec.get("qkv_bias", False),
                "model.mixers.attention.window": spec.get("window_size"),
                "model.mixers.attention.rotary_base": spec.get("rope_theta", 10_000.0),
            }
        )
    if any(setting != settings[0] for setting in settings):
        raise ConfigError(f"{path} has attention layers that differ in more than their place, which is not supported.")
    return {"model.mixer": mixers} | (settings[0] if settings else {})
