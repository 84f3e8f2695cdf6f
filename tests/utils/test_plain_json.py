"""JSON of others: what is too much is refused soon, and in a few words."""

import json
import time

import pytest

from gspo_megatron.utils import plain_json

BAD = {
    "lists in lists": (b"[" * 100_000, "nested too deep"),
    "tables in tables": (b'{"a":' * 100_000, "nested too deep"),
    "complete": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "100 MB": (b'"' + b"x" * (100 << 20) + b'"', "over 16 MB"),
    "a number of a million digits": (b"9" * 10**6, "Exceeds the limit"),
    "not UTF-8": (b'"\xff"', "codec can't decode"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    "cut": (b'{"a": [1, 2', "Expecting"),
    "empty": (b"", "Expecting value"),
    "NUL": (b"\0" * 1000, "Expecting value"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_a_few_words(tmp_path, name):
    data, said = BAD[name]
    (tmp_path / "a.json").write_bytes(data)
    began = time.monotonic()
    for read in (lambda: plain_json.parse(data), lambda: plain_json.read_object(tmp_path / "a.json")):
        with pytest.raises(ValueError, match=said) as caught:
            read()
        assert len(str(caught.value)) < 200
    assert time.monotonic() - began < 5


def test_an_object_is_read(tmp_path):
    """With a byte-order mark too; other values are named."""
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": ["ü", 1e300]}).encode())
    assert plain_json.read_object(path) == {"a": ["ü", 1e300]}
    for text, kind in (("[]", "list"), ("null", "NoneType"), ("1", "int")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"holds a {kind}, must be a JSON object"):
            plain_json.read_object(path)
