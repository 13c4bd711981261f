"""What the commands share: flags and config overrides, mistakes said in one sentence, the compilation cache."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from gla_jax.config import ConfigError

_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[dict[str, str]], int | str | None]) -> None:
    """Run a command and exit: parse its flags, call `main`, exit with what it returns, as `sys.exit` understands it.

    A mistake of the user's becomes one sentence on standard error and exit code 2, Ctrl-C becomes exit code 130.

    Args:
        main: takes what `--config.NAME=VALUE` arguments say, {name: value}.
    """
    try:
        app.run(main, flags_parser=_parse_flags)
    except ConfigError as error:
        sentence = str(error)
    except flags.Error as error:
        sentence = str(error).splitlines()[0]  # several may be missing
        if missing := re.search(r"Flag --(\w+) must have a value other than None", sentence):
            sentence = f"--{missing[1]}=... is missing; --help says what it is."
    except OSError as error:
        if error.errno not in _FULL_OR_READ_ONLY:
            _leave_cluster(1, error)
            raise
        sentence = f"Cannot write {error.filename or 'a file'}: {error.strerror}."
    except KeyboardInterrupt:
        os._exit(130)  # at once, whatever background threads may be doing
    except Exception as error:
        _leave_cluster(1, error)
        raise
    print(sentence, file=sys.stderr)
    _leave_cluster(2)
    sys.exit(2)


def _leave_cluster(code: int, error: Exception | None = None) -> None:
    """Exit at once if this is one process of several: an orderly exit would wait for the rest, and they for this one.

    They notice its silence, and end too; see `gla_jax.parallel.mesh.join_cluster`.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    if error is not None:
        traceback.print_exception(error)
        print("If this is about a connection, another task died: see what the other processes said.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parse_flags(argv: list[str]) -> dict[str, str]:
    """Hand absl its flags, which it keeps, and return the overrides of config fields, which it does not know."""
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        if "config" in flags.FLAGS:
            from gla_jax.config import describe

            print(f"\nFields of the config, with their defaults:\n{describe()}")
        sys.exit(0)
    overrides, others = {}, []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            others.append(argument)
        elif equals:
            overrides[name.removeprefix("--config.")] = value
        else:
            raise ConfigError(f"{name} has no value; write {name}=VALUE.")
    if overrides and "config" not in flags.FLAGS:
        raise ConfigError(f"--config.{min(overrides)} is no flag of this command, which takes no config.")
    if stray := flags.FLAGS(others)[1:]:
        raise ConfigError(f"{stray[0]!r} is no flag; flags are written --name=value.")
    verbosity = flags.FLAGS["verbosity"]
    if verbosity.using_default_value:
        verbosity.value, verbosity.using_default_value = -1, False  # warnings; absl would show Orbax's every move
    _use_compilation_cache()
    return overrides


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "gla-jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
