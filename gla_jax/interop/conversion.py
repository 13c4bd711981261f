"""Checkpoints from Hugging Face's format into ours and back: a tensor at a time, and all or nothing."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax.config import Config, ConfigError, as_dict
from gla_jax.data import load_tokenizer
from gla_jax.interop.architectures import ARCHITECTURES, TOKENIZER_FILES
from gla_jax.interop.folder import Places, flatten, names_of, open_model, their_shape, to_theirs
from gla_jax.interop.safetensors import FolderWriter
from gla_jax.interop.translation import write_config
from gla_jax.models import abstract_model
from gla_jax.models.language_model import layer_mixers
from gla_jax.training.checkpoint import iterate_params, write_params
from gla_jax.training.workdir import read_config

Log = Callable[[str], None]


def import_model(source: Path, workdir: Path, *, log: Log = lambda _: None) -> Config:
    """Make a workdir of ours from a Hugging Face directory, holding one of its tensors in memory at a time.

    The workdir has a config.json, the tokeniser's files, and a checkpoint of step 0 with parameters and nothing else:
    what evaluation, sampling, `gla_jax.load_model` and `--config.init_from` want.

    Args:
        source: config.json, safetensors files, tokeniser files.
        workdir: must not exist, or be empty.
        log: called with a sentence about what is worth knowing.

    Returns:
        The config.

    Raises:
        ConfigError: see `gla_jax.interop.folder.open_model`; nothing is left behind then.
    """
    config, _, pairs = open_model(source)
    params = jax.tree.map(lambda pair: pair[1], pairs, is_leaf=lambda pair: isinstance(pair, tuple))
    size = sum(parameter.size * parameter.dtype.itemsize for _, parameter in flatten(params))
    with _all_or_nothing(workdir, size) as partial:
        copied = _copy_files(source, partial)
        tokenizer = next((name for name in TOKENIZER_FILES[:2] if name in copied), TOKENIZER_FILES[0])
        if tokenizer not in copied:
            log(f"{source} has no tokenizer.json or tokenizer.model; put one into {workdir} before you use text.")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(workdir / tokenizer)))
        _write_json(partial / "config.json", as_dict(config))
        write_params(partial / "checkpoints", params)
    return config


def export_model(
    workdir: Path,
    target: Path,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    log: Log = lambda _: None,
) -> None:
    """Write the newest parameters of a workdir (their moving average if it keeps one) as a Hugging Face directory.

    Args:
        workdir: of a run, or of `import_model`.
        target: must not exist, or be empty.
        architecture: a name in `ARCHITECTURES`; None: the one whose mixer the model has, "llama" or, with a window,
            "mistral" for attention.
        dtype: "float32" or "bfloat16"; None: as the parameters are held.
        log: called with a sentence about what is worth knowing.

    Raises:
        ConfigError: the model has something that the architecture has not; nothing is left behind then.
    """
    config = read_config(workdir)
    if config.model.vocab_size is None:
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    kind = architecture or _architecture_for(config)
    if kind not in ARCHITECTURES:
        raise ConfigError(f"--architecture={kind} is unknown; choose one of {', '.join(ARCHITECTURES)}.")
    dtype = dtype or config.dtype.params
    theirs = write_config(config, kind, dtype)
    _, abstract = abstract_model(config.model, config.dtype)
    places: dict[str, Places] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, leaf in flatten(abstract):
        found = names_of(ours, config.model, ARCHITECTURES[kind])
        if found is None:
            raise ConfigError(f"A {kind} has no tensor for {ours}, which the model of {workdir} has.")
        places[ours] = found
        shape = their_shape(ours.rpartition("/")[2], leaf.shape[1:] if found.stacked else leaf.shape)
        shapes |= {names[0]: shape for names in found.names}

    size = sum(math.prod(shape) for shape in shapes.values()) * jnp.dtype(dtype).itemsize
    with _all_or_nothing(target, size) as partial:
        theirs |= _write_tokenizer(config, partial, log)
        _write_json(partial / "config.json", theirs)
        writer = FolderWriter(partial, shapes, np.dtype(jnp.dtype(dtype)))
        for path, array in iterate_params(workdir / "checkpoints", abstract, log):
            found = places["/".join(path)]
            layers = array if found.stacked else [array]
            writer.write(
                (names[0], to_theirs(path[-1], layer)) for names, layer in zip(found.names, layers, strict=True)
            )


def _architecture_for(config: Config) -> str:
    mixers = set(layer_mixers(config.model))
    if mixers == {"attention"}:
        return "llama" if config.model.mixers["attention"].window is None else "mistral"
    kinds = {"gla": "gla", "retention": "retnet"}
    found = [kinds[mixer] for mixer in kinds if mixer in mixers]
    if not found:
        raise ConfigError(f"Neither fla nor transformers is written for model.mixer={config.model.mixer!r}.")
    return found[0]


@contextlib.contextmanager
def _all_or_nothing(folder: Path, size: int) -> Iterator[Path]:
    """Yield a folder to write to that takes its name at the end, or is removed if anything goes wrong.

    Args:
        folder: the name that it shall have.
        size: bytes that will be written, or a little more.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give the name of a folder that is yet to be made.")
    partial = folder.absolute().with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}.") from None
    try:
        free = shutil.disk_usage(partial).free
        if free < size:
            raise ConfigError(f"{folder} takes {size / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB left.")
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_files(source: Path, target: Path) -> list[str]:
    """Copy the tokeniser's files and return their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _write_tokenizer(config: Config, target: Path, log: Log) -> dict[str, Any]:
    """Write the files of the run's tokeniser, and return what config.json says of it."""
    path = Path(config.data.tokenizer)
    if config.data.tokenizer == "bytes":
        _write_json(target / "tokenizer.json", _bytes_as_bpe())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "bos_token": _END}
        _write_json(target / "tokenizer_config.json", settings)
    elif not path.is_file():
        log(f"data.tokenizer={config.data.tokenizer!r} is not there; so the directory has no tokeniser.")
        return {}
    else:
        _copy_files(path.parent, target)
        # A folder may hold several under names of their own; the one that the run used goes by the usual name.
        shutil.copyfile(path, target / ("tokenizer.json" if path.suffix == ".json" else "tokenizer.model"))
        if path.suffix == ".json":
            (target / "tokenizer.model").unlink(missing_ok=True)
        if path.suffix != ".json" and not (target / "tokenizer_config.json").exists():
            _write_json(target / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    end = load_tokenizer(config.data.tokenizer).end_of_document
    ids = {"bos_token_id": end, "eos_token_id": end}
    with contextlib.suppress(OSError, ValueError):  # what a model came with knows better
        generation = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
        ids |= {name: generation[name] for name in ids if name in generation}
    return ids


_END = "<|endoftext|>"


def _bytes_as_bpe() -> dict[str, Any]:
    """Return the byte tokeniser as a tokenizer.json: a byte-level BPE without merges, NUL ending documents."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {_END: 0} | {letters[byte]: byte for byte in range(1, 256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 0, "content": _END, "special": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | plain],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False},
    }
