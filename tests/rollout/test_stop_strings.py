"""Stop strings against the plain rule: the first token after which the whole text has one of them."""

import pytest
import torch

from gspo_megatron.rollout.stop_strings import StopStrings
from tests.data.templates import PLAIN, tokenizer

TOKENIZER = tokenizer(PLAIN)
STRINGS = ("</a>", "\nQ:", "né", "<|user|>", "<|user|>\n")


def plain(ids: list[int], strings: tuple[str, ...]) -> tuple[int, str] | None:
    """(number of tokens, text before the string) where a response ends, by decoding all of it after each token."""
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count], skip_special_tokens=False)
        places = [text.find(string) for string in strings if string in text]
        if places:
            return count, text[: min(places)]
    return None


@pytest.mark.parametrize("string", STRINGS)
def test_a_string_over_several_tokens_ends_a_response(string):
    """Bytes are tokens here, so "é" is two of them, and the last one completes it."""
    stops = StopStrings((string,), TOKENIZER)
    ids = TOKENIZER.encode(f"7 é x{string}y{string}")
    count = next(n for n in range(1, len(ids) + 1) if stops.ends(ids[:n]))
    assert (count, "7 é x") == plain(ids, (string,))
    assert stops.text(ids[:count]) == "7 é x"


def test_no_string_leaves_the_text_as_it_is():
    stops, ids = StopStrings(("zz",), TOKENIZER), TOKENIZER.encode("a<|user|>b")
    assert not stops.ends(ids) and stops.text(ids) == "ab" and stops.text([]) == ""


def test_a_token_that_is_no_text_may_stand_inside():
    """Ids beyond the tokenizer's, which a padded vocabulary has, decode to nothing."""
    nothing = [len(TOKENIZER) + 5] * 40
    a, b = TOKENIZER.encode("xa"), TOKENIZER.encode("b")
    stops = StopStrings(("ab",), TOKENIZER)
    assert stops.ends(a + nothing + b) and stops.text(a + nothing + b) == "x"


def test_a_token_that_reaches_behind_the_string():
    """Its text ends in the middle of a token; what the string leaves of it in front is kept."""
    made = tokenizer(PLAIN)
    made.add_tokens(["one two"])
    stops, ids = StopStrings(("e t",), made), made.encode("xone twox")
    assert len(ids) == 3 and not stops.ends(ids[:1]) and stops.ends(ids[:2])
    assert stops.text(ids[:2]) == "xon"


def test_random_responses_end_where_the_plain_rule_ends_them():
    """2000 sequences of random tokens, among them broken bytes, over a few letters that make the strings likely."""
    generator = torch.Generator().manual_seed(0)
    strings = ("ab", "bca", "né", "a<|user|>")
    letters = TOKENIZER.encode("abcné") + TOKENIZER.encode("<|user|>") + [len(TOKENIZER) + 1]
    stops, ended = StopStrings(strings, TOKENIZER), 0
    for _ in range(2000):
        ids = [letters[i] for i in torch.randint(0, len(letters), (12,), generator=generator).tolist()]
        count = next((n for n in range(1, 13) if stops.ends(ids[:n])), None)
        expected = plain(ids, strings)
        assert count == (expected and expected[0]), ids
        if expected:
            ended += 1
            if "\ufffd" in expected[1]:
                continue  # without the special token between them, two halves of a character are one
            assert stops.text(ids[:count]) == expected[1].replace("<|user|>", "")
    assert 200 < ended < 2000
