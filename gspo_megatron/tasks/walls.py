"""What the kernel refuses to a process that handles text of a model: Landlock, seccomp, limits.

`fence` is for the process that scores: it may read files, and may change none, connect nowhere by TCP and signal
nobody but its own children. `confine` is for a process that evaluates text: it may compute, and read and write what
is open already; every other system call fails with EPERM. Neither can be taken off again, by whatever runs inside.

Left out: namespaces of users, processes and networks, and programs that make them (bubblewrap, nsjail). They need
rights that a container seldom has, and a process that can neither open, start, signal nor connect has no use for them.

Sources: Linux' Documentation/userspace-api/landlock.rst (rights by ABI) and seccomp_filter.rst; numbers of system calls
are those of asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import ctypes
import math
import os
import platform
import resource
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

# Name -> number on x86_64 and on aarch64; None: the machine has no such call.
COMPUTING = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
# Machine -> column of COMPUTING, and the kernel's AUDIT_ARCH, by which a filter knows 32-bit calls.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # bit of x86_64's third set of calls
# Classic BPF of seccomp: load a word of struct seccomp_data, compare, return.
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # 1: EPERM

LANDLOCK_CREATE, LANDLOCK_RESTRICT, LANDLOCK_VERSION = 444, 446, 1
READS = 0b1101  # execute, read_file, read_dir of landlock.h
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # Landlock's ABI -> how many rights on files it knows


class WallError(Exception):
    """The kernel refused a wall."""


def landlock_abi() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    return max(_libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), LANDLOCK_VERSION), 0)


def has_seccomp() -> bool:
    """Tell whether this kernel takes a filter of system calls, and this machine's calls are in our table."""
    if platform.machine() not in MACHINES:
        return False
    # A filter at address 0 cannot be read (EFAULT); a kernel without filters does not get that far (EINVAL).
    return _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0) == -1 and ctypes.get_errno() == 14


def describe() -> str:
    """Say which walls stand here, for the header of a run."""
    abi = landlock_abi()
    landlock = f"Landlock (ABI {abi})" if abi else "no Landlock in this kernel"
    return f"{'seccomp' if has_seccomp() else 'no seccomp in this kernel'}, {landlock}, limits"


def fence(memory: int) -> None:
    """Let this process and its children change no file, connect nowhere by TCP and signal none but themselves.

    Each as far as this kernel's Landlock goes: files from ABI 1 (Linux 5.13), TCP from 4 (6.7), signals from 6 (6.12).

    Args:
        memory: bytes of address space.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _landlock(reads=True)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent` ends, which must be the one that forked it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def confine(seconds: float) -> None:
    """Let this process compute, and read and write what is open, and nothing else, for good.

    Raises:
        WallError: the kernel refused a wall. Nothing may be evaluated then.
    """
    cpu = math.ceil(seconds) + 1
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _landlock(reads=False)  # takes a file descriptor, so before the limits
    limits = {"CPU": cpu, "FSIZE": 0, "NOFILE": 0, "NPROC": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    _seccomp()


def _landlock(reads: bool) -> None:
    abi = landlock_abi()
    if not abi:
        return
    files = (1 << RIGHTS.get(abi, max(RIGHTS.values()))) - 1
    network, scope = (0b11 if abi >= 4 else 0), (0b11 if abi >= 6 else 0)  # bind, connect; abstract sockets, signals
    parts = [files & ~READS if reads else files, network, scope][: 1 if abi < 4 else 2 if abi < 6 else 3]
    attributes = struct.pack(f"={len(parts)}Q", *parts)
    # No rule is added, so nothing of what the set handles is allowed.
    fd = _checked(_libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0), "Landlock")
    try:
        _checked(_libc.syscall(LANDLOCK_RESTRICT, fd, 0), "Landlock")
    finally:
        os.close(fd)


def _seccomp() -> None:
    program = _filter(platform.machine())
    array = ctypes.create_string_buffer(program)
    # struct sock_fprog: a count of 8-byte instructions, and their address.
    count_and_address = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(array)))
    _checked(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, count_and_address, 0, 0), "seccomp")


def _filter(machine: str) -> bytes:
    """The BPF program that allows COMPUTING alone."""
    column, arch = MACHINES[machine]
    numbers = [number for row in COMPUTING.values() if (number := row[column]) is not None]
    step = struct.Struct("=HBBI").pack
    program = [step(LOAD, 0, 0, 4), step(EQUAL, 1, 0, arch), step(RETURN, 0, 0, KILL)]
    program += [step(LOAD, 0, 0, 0), step(ABOVE, 0, 1, X32), step(RETURN, 0, 0, KILL)]
    program += [step(EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    return b"".join([*program, step(RETURN, 0, 0, REFUSE), step(RETURN, 0, 0, ALLOW)])


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise WallError(f"{what} cannot be set up: {os.strerror(number)}")
    return result
