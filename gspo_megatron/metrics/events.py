"""TensorBoard's view of a run: the scalars of each metric row, an event a row.

Written by TensorBoard's own record writer from the thread that has the row, because TensorBoard's usual writer, a
thread of its own, prints a trace there when the disk is full. Left out: everything but scalars.
"""

import os
import socket
import time
from io import FileIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gspo_megatron.metrics.sink import Row
from gspo_megatron.utils.small_files import append


class EventFile:
    """An events file of this process in a folder, which may have those of earlier ones. Raises OSError."""

    def __init__(self, folder: Path, earlier: list[Row]):
        """`earlier` are the rows of the record, which are made again where a start has removed the old events."""
        is_new = not (folder.is_dir() and any(folder.iterdir()))  # a link is left, to an empty folder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = FileIO(folder / name, "a")
        self._records = RecordWriter(self)  # which hands on whole records
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for row in earlier if is_new else []:
            self.log(*row)

    def write(self, record: bytes) -> None:
        """Append a record, whole or not at all."""
        append(self._file, record)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append what was measured at a step. Raises OSError where the disk cannot take it."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._records.write(event.SerializeToString())

    def close(self, patience: float) -> None:
        """Close the file; it is complete after each write, so there is nothing to wait for."""
        self._file.close()
