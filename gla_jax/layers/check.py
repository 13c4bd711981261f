"""What layers check of their options: each mistake is a ConfigError of one sentence."""

import difflib
from collections.abc import Sequence

from gla_jax.config import ConfigError


def check_divides(name: str, value: int, of_name: str, of: int, try_divisors_of: int | None = None) -> None:
    """Raise ConfigError unless `value` divides `of`, and say which nearby numbers would.

    Args:
        name, value: the field that must divide, and its value.
        of_name, of: what it must divide.
        try_divisors_of: number whose divisors are offered, if others than those of `of`.
    """
    if value >= 1 and of % value == 0:
        return
    number = try_divisors_of or of
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    near = [*[d for d in divisors if d < value][-1:], *[d for d in divisors if d > value][:1]]
    raise ConfigError(f"{name}={value} does not divide {of_name}={of}; try {' or '.join(map(str, near))}.")


def check_one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    """Raise ConfigError unless `value` is one of `known`, and offer the nearest of them."""
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [word for word in known if word is not None], n=1)
    cure = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, known))}."
    raise ConfigError(f"{name}={value!r} is unknown; {cure}")
