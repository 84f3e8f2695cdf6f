"""Files written in the background: the bytes, the errors, and the wait for the disk."""

import errno
import os
import threading

import pytest
import torch

from gspo_megatron.utils.file_writing import Ahead, FileWriter


def test_bytes_and_tensors_come_to_their_places(tmp_path):
    """Two files in turns; 3 bytes of zeros lie before the second part, and a file of 12 bytes keeps its size."""
    writer = FileWriter(tmp_path)
    writer.create("a")
    writer.create("b", 12)
    numbers = torch.tensor([1, 2, 3], dtype=torch.int16)
    assert writer.write("a", [b"xy", numbers, b"z"], 0) == 9
    assert writer.write("b", [b"end"], 3) == 6
    assert writer.write("a", [b"!"], 12) == 13
    writer.finish()
    assert (tmp_path / "a").read_bytes() == b"xy\x01\0\x02\0\x03\0z\0\0\0!"
    assert (tmp_path / "b").read_bytes() == b"\0\0\0end" + bytes(6)


def test_the_end_waits_for_the_disk(tmp_path, monkeypatch):
    """Each file once, after its last byte."""
    asked, monkey = [], monkeypatch.setattr
    monkey(os, "fsync", lambda descriptor: asked.append(os.fstat(descriptor).st_size))
    writer = FileWriter(tmp_path)
    for file, writes in (("a", 3), ("b", 5)):
        writer.create(file)
        for number in range(writes):
            writer.write(file, [bytes(30)], 30 * number)
    writer.finish()
    assert asked == [90, 150]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    writer = FileWriter(tmp_path)
    writer.create("a")
    with pytest.raises(OSError, match="No space left") as caught:
        writer.write("a", [b"x"], 0)
        writer.finish()
    assert caught.value.filename == str(tmp_path / "a") and caught.value.errno == errno.ENOSPC
    writer.abandon()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copies")]


def test_calls_wait_in_order_and_few_ahead():
    """With depth 2 the first call holds up the third submit; what was left is not run after abandon."""
    gate, done = threading.Event(), []
    ahead = Ahead("test", 2)
    ahead.submit(gate.wait)
    ahead.submit(done.append, 1)
    threading.Timer(0.05, gate.set).start()
    ahead.submit(done.append, 2)  # waits for the gate
    assert gate.is_set()
    ahead.finish()
    assert done == [1, 2]
    stopped = Ahead("test", 2)
    held = threading.Event()
    stopped.submit(held.wait)
    stopped.submit(done.append, 3)
    threading.Timer(0.05, held.set).start()
    stopped.abandon()
    assert done == [1, 2]
