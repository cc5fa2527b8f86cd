import platform

import pytest

from tests.python_process import finish, start

FAULTS = """
    import ctypes, resource
    from experiments.runtime import (memory)

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))
        libc.memset(block, 1, ctypes.c_size_t(2**26))
        libc.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    fresh = faults()
    memory.keep_freed()
    faults()
    print(fresh, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory")
def test_freed_memory_is_reused():
    """Each fresh page gives a fault: at least 1,000 in 64 MB, with pages of at most 64 kB."""
    output, _ = finish(start(FAULTS))
    fresh, kept = map(int, output.split())
    assert fresh >= 1000 and kept < 10
