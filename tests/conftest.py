import ctypes
import mmap
import os
import signal
from pathlib import Path

import jax
import pytest

STATM = Path("/proc/self/statm")  # on Linux; its second number is the process's resident pages
MOST_MEMORY = 3 << 29  # bytes, after a test

jax.config.update("jax_num_cpu_devices", 8)  # virtual devices, for tests of several devices
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compiles each program once for all tests and for the commands that they run."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # of all workers
    settings = {
        "jax_compilation_cache_dir": str(place / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Each takes a dozen memory maps. Linux allows 65,530, and XLA aborts beyond that."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def release_memory():
    """Compiled programs take gigabytes, which glibc keeps after they are freed."""
    yield
    if STATM.exists() and int(STATM.read_text().split()[1]) * mmap.PAGESIZE > MOST_MEMORY:
        jax.clear_caches()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder of links to the original data in BNLSTM_DATA_DIR, which is only read."""
    folder = Path(os.environ.get("BNLSTM_DATA_DIR", "")).resolve()
    if "BNLSTM_DATA_DIR" not in os.environ or not folder.is_dir():
        pytest.skip("needs original data: BNLSTM_DATA_DIR names no folder")
    links = tmp_path_factory.mktemp("data")  # where data sets are prepared, once
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    return links
