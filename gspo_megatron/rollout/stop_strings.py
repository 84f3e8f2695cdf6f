"""Strings that end a response, found in its decoded text, over the borders of tokens.

They are looked for in the text with its special tokens, so that a string may be one. Left out: a match that begins in
the prompt, and a detokenizer that goes on from token to token: the last few tokens are decoded anew after each.
"""

from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Knows where a response ends by its text. Raises nothing."""

    def __init__(self, strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase):
        self.strings, self.tokenizer = strings, tokenizer
        # A token that decodes to something has a byte or more; the one in front may lose its leading space.
        self._enough = max(len(text.encode()) for text in strings) + 1
        self._is_text = lru_cache(maxsize=None)(lambda token: self._decode([token]) != "")

    def ends(self, token_ids: list[int]) -> bool:
        """Tell whether a string has been completed. Called after each token, so only the last tokens are looked at."""
        start, seen = len(token_ids), 0
        while start > 0 and seen < self._enough:
            start -= 1
            seen += self._is_text(token_ids[start])
        text = self._decode(token_ids[start:])
        return any(string in text for string in self.strings)

    def text(self, token_ids: list[int]) -> str:
        """Return a response's text without special tokens, up to the first of the strings."""
        whole = self._decode(token_ids)
        places = [place for string in self.strings if (place := whole.find(string)) >= 0]
        if not places:
            return self._decode(token_ids, skip=True)
        kept = whole[: min(places)]
        # The last tokens may reach into the string: those before them as they are, and then what is left of the text.
        count = next(n for n in range(len(token_ids), -1, -1) if kept.startswith(self._decode(token_ids[:n])))
        return self._decode(token_ids[:count], skip=True) + kept[len(self._decode(token_ids[:count])) :]

    def _decode(self, token_ids: list[int], skip: bool = False) -> str:
        return cast(str, self.tokenizer.decode(token_ids, skip_special_tokens=skip))
