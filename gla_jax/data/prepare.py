"""Turn text into token files, once, for any number of runs.

    python -m gla_jax.data.prepare --input 'text/*.jsonl.gz' --output tokens --tokenizer tokenizer.json
    python train.py --config=... --config.data.path=tokens --config.data.tokenizer=tokens/tokenizer.json

Reads .txt (a file is a document, or documents between --separator), .jsonl, .jsonl.gz and .parquet. Run again after a
kill, the same command makes what is missing; with more input files, it adds them at the end.
"""

import argparse
import contextlib
import fcntl
import glob
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from gla_jax.config import ConfigError
from gla_jax.data import manifest as manifests
from gla_jax.data.manifest import Manifest, Shard, load_manifest
from gla_jax.data.readers import SUFFIXES, read_documents
from gla_jax.data.token_file import TokenWriter
from gla_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SHARD_BYTES = 1 << 30
"""Input files are put together up to this size into one token file, which is what a killed run may lose."""
_BATCH_CHARACTERS = 1 << 20
_TRAINING_CHARACTERS = 200 << 20
"""Text that a tokeniser is trained on at most, taken evenly from the input files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 2 after a mistake of the user's."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m gla_jax.data.prepare",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="FILE", help="text files, or quoted globs of them"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the token files go")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help='"bytes" (default), a Hugging Face tokenizer.json or a SentencePiece .model',
    )
    parser.add_argument(
        "--train_tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of SIZE ids on the input instead"
    )
    parser.add_argument("--text_field", default="text", help='field or column with the text (default: "text")')
    parser.add_argument("--separator", help='what stands between documents in .txt, such as "<|endoftext|>"')
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, each at a token file of its own (default: 1)"
    )
    flags = parser.parse_args(arguments)
    try:
        made = prepare(
            flags.input,
            flags.output,
            tokenizer=flags.tokenizer,
            train_size=flags.train_tokenizer,
            text_field=flags.text_field,
            separator=flags.separator,
            workers=flags.workers,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or flags.output}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    print(_summary(made, flags.output))
    return 0


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: str = "bytes",
    train_size: int | None = None,
    text_field: str = "text",
    separator: str | None = None,
    workers: int = 1,
) -> Manifest:
    """Tokenise files into a folder, or finish what an earlier call with the same settings began there.

    Args:
        inputs: paths and globs.
        output: the folder.
        tokenizer: as in `load_tokenizer`.
        train_size: train a byte-level BPE of this many ids on the input instead.
        text_field: field or column that holds the text in .jsonl and .parquet.
        separator: what stands between the documents of a .txt file; None: a file is one document.
        workers: processes that share the work.

    Returns:
        The manifest of the finished folder.

    Raises:
        ConfigError: if an input cannot be read, or the folder was made otherwise.
    """
    if workers < 1:
        raise ConfigError(f"--workers={workers} must be at least 1.")
    if train_size is not None and tokenizer != "bytes":
        raise ConfigError(f"--tokenizer={tokenizer} and --train_tokenizer={train_size} exclude each other.")
    files = _find(inputs)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        settings = {"text_field": text_field, "separator": separator}
        manifest, loaded = _open_folder(output, settings, tokenizer, train_size, files)
        _plan(manifest, files, workers)
        manifest.save(output)
        todo = [shard for shard in manifest.shards if shard.counts is None]
        with _Progress(sum(file["size"] for shard in todo for file in shard.inputs)) as progress:
            for shard, counts in _make(todo, output, loaded, settings, workers, progress.advance):
                shard.counts = counts
                manifest.save(output)
    if not sum(shard.counts["documents"] for shard in manifest.shards if shard.counts):
        raise ConfigError(f"--input={' '.join(inputs)} holds no text.")
    return manifest


def _find(inputs: Sequence[str]) -> list[Path]:
    files: dict[Path, None] = {}
    for pattern in inputs:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise ConfigError(f"--input={pattern} matches no file.")
        for name in found:
            path = Path(name).absolute()
            if not path.is_file():
                raise ConfigError(f"--input: there is no file {name}.")
            if not name.endswith(SUFFIXES):
                raise ConfigError(f"--input: {name} is none of {', '.join(SUFFIXES)}.")
            files[path] = None
    return list(files)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder} is being written by another run of prepare.") from None
        yield


def _open_folder(
    folder: Path, settings: dict[str, Any], tokenizer: str, train_size: int | None, files: Sequence[Path]
) -> tuple[Manifest, Tokenizer]:
    """Return the folder's manifest, a new one if it has none, and the tokeniser, loaded."""
    for path in folder.glob("*.partial"):
        path.unlink()
    trained = folder / "tokenizer.json"
    if (folder / manifests.NAME).exists():
        manifest = load_manifest(folder)
        if train_size is not None:
            tokenizer = str(trained)
            settings["train_tokenizer"] = train_size
        loaded = load_tokenizer(tokenizer)
        if loaded.fingerprint != manifest.settings["tokenizer"]["fingerprint"]:
            was = manifest.settings["tokenizer"]
            raise ConfigError(
                f"{folder} was made with tokenizer {was['name']} ({was['fingerprint'][:8]}), "
                f"not {loaded.name} ({loaded.fingerprint[:8]}); choose another --output."
            )
        for name, value in settings.items():
            if (was := manifest.settings.get(name)) != value:
                raise ConfigError(f"{folder} was made with --{name}={was}, not {value}; choose another --output.")
        return manifest, loaded

    own = (".lock", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    for path in folder.iterdir():
        if path.name not in own:
            raise ConfigError(f"{folder} holds {path.name} and no {manifests.NAME}; choose an empty --output.")
    if train_size is not None:
        train_tokenizer(_texts(files, settings), train_size, trained)
        tokenizer = str(trained)
    loaded = load_tokenizer(tokenizer)
    if tokenizer not in ("bytes", str(trained)):
        # A folder that has its tokeniser can be moved and shared.
        source = Path(tokenizer)
        shutil.copyfile(source, folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))
        if (config := source.with_name("tokenizer_config.json")).exists():
            shutil.copyfile(config, folder / config.name)
    made_with = {"name": loaded.name, "fingerprint": loaded.fingerprint}
    return Manifest({"tokenizer": made_with, "train_tokenizer": train_size, **settings}), loaded


def _texts(files: Sequence[Path], settings: dict[str, Any]) -> Iterator[str]:
    for path in files:
        left = _TRAINING_CHARACTERS // len(files)
        for text, _ in read_documents(path, settings["text_field"], settings["separator"]):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _plan(manifest: Manifest, files: Sequence[Path], workers: int) -> None:
    """Keep the finished shards, let the unfinished ones follow the files, and add shards for new files."""
    given = {str(path): _describe(path) for path in files}
    planned: set[str] = set()
    for shard in manifest.shards:
        names = [file["path"] for file in shard.inputs]
        planned.update(names)
        if shard.counts is None:
            # Whatever was wrong with a file may have been mended, or the file taken away.
            shard.inputs = [given[name] for name in names if name in given]
        for file in shard.inputs:
            if given.get(file["path"], file) != file:
                raise ConfigError(f"{file['path']} has changed since it was tokenised; choose another --output.")
    manifest.shards = [shard for shard in manifest.shards if shard.inputs]

    new = [file for name, file in given.items() if name not in planned]
    limit = min(SHARD_BYTES, -(-sum(file["size"] for file in new) // workers))
    number = max((int(shard.file.split(".")[0]) for shard in manifest.shards), default=-1)
    group: list[dict[str, Any]] = []
    for file in new:
        group.append(file)
        if sum(member["size"] for member in group) >= limit or file is new[-1]:
            number += 1
            manifest.shards.append(Shard(f"{number:05d}.tokens", group))
            group = []


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _make(
    todo: Sequence[Shard],
    folder: Path,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    workers: int,
    advance: Callable[[float], None],
) -> Iterator[tuple[Shard, dict[str, int]]]:
    """Make the token files of shards; yield each shard with its counts when its file is complete."""
    if min(workers, len(todo)) <= 1:
        for shard in todo:
            yield shard, _make_shard(shard, folder, tokenizer, settings, advance)
        return
    # Processes are spawned: a fork would copy the locks of the tokenisers' threads.
    context = multiprocessing.get_context("spawn")
    read = context.Value("d", 0.0)
    others = set(multiprocessing.active_children())
    with futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, read)) as pool:
        waiting = {pool.submit(_work, shard, folder, settings): shard for shard in todo}
        shown = 0.0
        try:
            while waiting:
                finished, _ = futures.wait(waiting, timeout=1, return_when=futures.FIRST_COMPLETED)
                advance(read.value - shown)
                shown = read.value
                for future in finished:
                    yield waiting.pop(future), future.result()
        except futures.process.BrokenProcessPool:
            raise ConfigError("A worker was killed, for want of memory perhaps; try fewer --workers.") from None
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # rather than wait for shards that may take minutes
            raise


def _make_shard(
    shard: Shard, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], advance: Callable[[float], None]
) -> dict[str, int]:
    texts: list[str] = []
    with TokenWriter(folder / shard.file, tokenizer) as writer:

        def flush() -> None:
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                writer.add(ids, len(text.encode("utf-8", "replace")))
            texts.clear()

        for file in shard.inputs:
            seen, characters = 0.0, 0
            for text, share in read_documents(Path(file["path"]), settings["text_field"], settings["separator"]):
                texts.append(text)
                characters += len(text)
                if characters >= _BATCH_CHARACTERS:
                    flush()
                    advance((share - seen) * file["size"])
                    seen, characters = share, 0
            flush()
            advance((1 - seen) * file["size"])
    return {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.bytes}


# What a worker process keeps between shards.
_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Tokenizer, read: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    _worker.update(tokenizer=tokenizer, read=read)


def _work(shard: Shard, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    def advance(size: float) -> None:
        with _worker["read"].get_lock():
            _worker["read"].value += size

    return _make_shard(shard, folder, _worker["tokenizer"], settings, advance)


class _Progress:
    """How far the reading is: a bar for a person at a terminal, a line every ten seconds for a log."""

    def __init__(self, total: float):
        self._total = total
        self._done = 0.0
        self._start = self._shown = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            columns = rich.progress.BarColumn, rich.progress.DownloadColumn, rich.progress.TransferSpeedColumn
            self._bar = rich.progress.Progress(
                *(column() for column in columns),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "_Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: float) -> None:
        self._done += size
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif now - self._shown >= 10:
            self._shown = now
            rate = self._done / (now - self._start)
            print(
                f"{self._done / self._total:.0%} of {self._total / 1e6:,.0f} MB read, {rate / 1e6:.1f} MB/s, "
                f"{(self._total - self._done) / rate / 60:.0f} min left",
                file=sys.stderr,
            )


def _summary(manifest: Manifest, folder: Path) -> str:
    totals = {
        name: sum(shard.counts[name] for shard in manifest.shards if shard.counts)
        for name in ("documents", "tokens", "bytes")
    }
    names = {path.name for path in folder.glob("tokenizer.*")}
    flag = "".join(f" --config.data.tokenizer={folder / name}" for name in names)
    return (
        f"{totals['documents']:,} documents, {totals['tokens']:,} tokens of "
        f"{totals['bytes'] / totals['tokens']:.2f} bytes, in {len(manifest.shards)} token files.\n"
        f"To train on them: --config.data.path={folder}{flag}"
    )


if __name__ == "__main__":
    sys.exit(main())
