"""The manifest: which format a checkpoint has, and what is said of one that cannot be."""

import json
from pathlib import Path

import pytest

from gspo_megatron.backend.checkpoint import files
from gspo_megatron.backend.checkpoint.streaming import StoredWeights
from gspo_megatron.errors import CheckpointError

OLD = Path(__file__).parents[2] / "data/run_0_1_0/checkpoints/step_000002"
ONE = {name: [3, "a" * 64] for name in (".metadata", "metadata.json", "progress.json")}


def test_a_manifest_without_a_number_is_the_first_format():
    """Of version 0.1.0; its .metadata has 61784 bytes."""
    told = files.manifest(OLD)
    assert told[".metadata"][0] == 61784 and set(told) >= {"__0_0.distcp", "progress.json", "hf/config.json"}


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "step_000001"
    aside = files.unfinished(folder)
    aside.mkdir()
    for name in ONE:
        (aside / name).write_bytes(b"abc")
    files.make_visible(folder, {})
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    assert files.manifest(folder) == dict.fromkeys(ONE, (3, sha))
    assert json.loads((folder / "manifest.json").read_text())["format"] == 2


def test_a_newer_format_is_refused_by_name(tmp_path):
    """Also where a checkpoint is converted."""
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 3, "pieces": []}))
    for read in (files.manifest, StoredWeights):
        with pytest.raises(files.NewerFormatError, match=r"manifest.json: format = 3: .* reads formats up to 2"):
            read(tmp_path)


DAMAGED = {
    "empty": b"",
    "{}": b"{}",
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b'{"\xff": 1}',
    "nested": b"[" * 100_000,
    "nested inside": b'{"a": ' * 100_000,
    "half": b'{"format": 2, "files": {".meta',
    "no files": b'{"format": 2}',
    "a number of a million digits": b'{"format": ' + b"9" * 10**6 + b"}",
    "a format by half": json.dumps({"format": 1.5, "files": ONE}).encode(),
    "a format as text": json.dumps({"format": "2", "files": ONE}).encode(),
    "a file elsewhere": json.dumps({"format": 2, "files": ONE | {"../../secret": [1, "a" * 64]}}).encode(),
    "a file at the root": json.dumps({"format": 2, "files": ONE | {"/dev/zero": [1, "a" * 64]}}).encode(),
    "no size": json.dumps({"format": 2, "files": ONE | {".metadata": ["a" * 64]}}).encode(),
    "no hash": json.dumps({"format": 2, "files": ONE | {".metadata": [3, "abc"]}}).encode(),
    "files of other types": json.dumps({"format": 2, "files": ONE | {".metadata": None}}).encode(),
    "an old one of too little": json.dumps({".metadata": [3, "a" * 64]}).encode(),
    "a file of tensors less": json.dumps({"format": 2, "files": ONE}).encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_manifest_is_named(tmp_path, name):
    (tmp_path / "manifest.json").write_bytes(DAMAGED[name])
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="manifest.json: damaged") as caught:
        files.manifest(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
