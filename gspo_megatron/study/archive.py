"""A study's data become one file: data.tar.xz, beside the report that was made from it.

Trainings write loose files into data/, one a run, so that a study which is cut short goes on with what is missing, and
so that the jobs of a Slurm array can share the folder. Hundreds of them would crowd a repository. Writing a report
therefore packs them, and from then on the packed file stands for the loose ones, which may be deleted. They are not
deleted here: another job of an array may be writing a report at the same time.
"""

import io
import lzma
import secrets
import tarfile
from pathlib import Path, PurePosixPath

from gspo_megatron.errors import GspoError

LOOSE = "data"
PACKED = "data.tar.xz"
LARGEST = 1 << 28  # bytes that a packed file may stand for: forty times the larger of our studies


def pack(files: dict[str, bytes]) -> bytes:
    """Make a tar.xz of the files, by name, in a folder data/. The same files make the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"{LOOSE}/{name}")  # whose time, owner and mode are constants
            entry.size = len(files[name])
            tar.addfile(entry, io.BytesIO(files[name]))
    return packed.getvalue()


def unpack(packed: bytes) -> dict[str, bytes]:
    """Return what pack() was given. All of it is decompressed first, because tarfile would not miss the end of a cut
    file.

    Raises:
        lzma.LZMAError, tarfile.TarError: it is damaged, or stands for more than LARGEST bytes.
    """
    with tarfile.open(fileobj=io.BytesIO(_decompressed(packed)), mode="r:") as tar:
        return {
            PurePosixPath(entry.name).name: file.read()
            for entry in tar
            # A sparse one may be of any size and take no room.
            if entry.isfile() and not entry.issparse() and (file := tar.extractfile(entry))
        }


def _decompressed(packed: bytes) -> bytes:
    machine = lzma.LZMADecompressor(memlimit=LARGEST)
    content = machine.decompress(packed, LARGEST + 1)
    if len(content) > LARGEST:
        raise lzma.LZMAError(f"it unpacks to over {LARGEST >> 20} MiB")
    if not machine.eof:
        raise lzma.LZMAError("it is cut short")
    return content


def read(folder: Path) -> dict[str, bytes]:
    """Return the data file of every run in a study's folder, sorted by name. A loose one counts before a packed one,
    because it is newer.

    Raises:
        GspoError: the packed file is damaged.
    """
    loose = {path.name: path.read_bytes() for path in (folder / LOOSE).glob("*.jsonl")}
    return dict(sorted({**_packed(folder), **loose}.items()))


def write(folder: Path) -> None:
    """Pack what read() finds. A packed file with the same content stays, since another xz may make other bytes of it.

    Raises:
        GspoError: the packed file is damaged.
    """
    files = read(folder)
    if files == _packed(folder):
        return
    aside = folder / f"{PACKED}.{secrets.token_hex(4)}"
    aside.write_bytes(pack(files))
    aside.replace(folder / PACKED)


def _packed(folder: Path) -> dict[str, bytes]:
    path = folder / PACKED
    try:
        return unpack(path.read_bytes()) if path.exists() else {}
    except (tarfile.TarError, lzma.LZMAError) as error:
        raise GspoError(f"{path}: is damaged ({error}). Restore it, or remove it to train its runs anew.") from error
