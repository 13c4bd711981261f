"""Text out of tokens as they are drawn: where it ends, and what of it may be shown already."""

from collections.abc import Iterable, Sequence

from gla_jax.data.tokenizer import Tokenizer


class TextStream:
    """The text of one row that is being drawn.

    Args:
        tokenizer: turns tokens into text.
        stops: strings that end the text and are not part of it.
        max_tokens: end after so many.
    """

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), max_tokens: int):
        self._tokenizer, self._stops, self._max_tokens = tokenizer, [stop for stop in stops if stop], max_tokens
        self.tokens: list[int] = []
        self.text = ""
        """All there is, or all there was before the end."""
        self.ended_by: str | None = None
        """"end" (of the document), "stop" (a stop string), "length", or None: it goes on."""
        self._shown = 0

    def add(self, tokens: Iterable[int]) -> None:
        """Take the next tokens; those after an end do not count."""
        if self.ended_by is not None:
            return
        for token in tokens:
            if token == self._tokenizer.end_of_document:
                self.ended_by = "end"
                break
            self.tokens.append(int(token))
            if len(self.tokens) >= self._max_tokens:
                self.ended_by = "length"
                break
        self.text = self._tokenizer.decode(self.tokens)
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.ended_by = self.text[: min(places)], "stop"

    def take(self) -> str:
        """Return what is new and certain: no half of a character, and nothing that may yet turn out to be a stop."""
        certain = len(self.text)
        if self.ended_by is None:
            certain = len(self.text.rstrip("\ufffd"))
            for stop in self._stops:
                for size in range(len(stop) - 1, 0, -1):
                    if self.text[:certain].endswith(stop[:size]):
                        certain -= size
                        break
        new = self.text[self._shown : certain]
        self._shown = max(self._shown, certain)
        return new
