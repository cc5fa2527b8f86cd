"""The default device, and emulation of others."""

import contextlib
from collections.abc import Iterator

import jax

_emulating = False


def default_device() -> jax.Device:
    """The device that programs run on unless their arrays say otherwise."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def runs_here(platform: str | None) -> bool:
    """Whether an implementation for a JAX platform (None for any) runs on the default device."""
    return platform is None or platform == default_device().platform or _emulating


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Lets kernels run on any device, interpreted or emulated, which is slow.

    Functions that are traced inside stay emulated. For tests, and to compile for an absent TPU.
    """
    global _emulating
    before, _emulating = _emulating, True
    try:
        yield
    finally:
        _emulating = before
