"""What the process does with the memory of tensors that are freed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for the next ones, where the C library is glibc.

    By itself it returns much of it to the kernel, which clears every page anew for the next tensor: a tenth of the time
    of a training step on a CPU, and a fifth of that of a small VAE. For programs to call once, when they compute on a
    CPU; it does nothing for GPUs.
    """
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt"):
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if not glibc.mallopt(M_MMAP_THRESHOLD, 2**30):
            glibc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that some versions take
