"""Memory of the process that nobody uses, given back to the system.

The C library keeps what is freed in pieces of less than 32 MiB for later. Where small things that stay are made between
large ones that go, such as the encoded items of a support set, that adds up to hundreds of megabytes.
"""

import ctypes


def give_back() -> None:
    """Give it back, where the C library can (glibc). It takes milliseconds, so not after every small thing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
