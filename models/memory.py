"""Memory of the process."""

from __future__ import annotations

import ctypes

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Let the C library keep memory that tensors on the CPU have freed, for the next ones; for the whole process.

    By default glibc gives large blocks back to the system at once, and every step of training asks for the same
    gradients again: the kernel then clears some hundred megabytes page by page, a tenth of a short step of SmolLM2.

    Returns:
        False where there is no glibc; then nothing is changed.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, 2**30) and library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
