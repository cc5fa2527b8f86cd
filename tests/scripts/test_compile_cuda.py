import pytest

from scripts import compile_cuda
from scripts.compile_cuda import GPUS, Kernel

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z7forwardv' for 'sm_90'
ptxas info    : Function properties for _Z7forwardv
    88 bytes stack frame, 104 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 128 registers, used 9 barriers, 88 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compiling entry function '_Z8backwardv' for 'sm_90'
ptxas info    : Function properties for _Z8backwardv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 97 registers, used 9 barriers
"""


def test_reads_what_ptxas_says_of_each_kernel():
    assert compile_cuda.parse(LOG) == [
        Kernel("_Z7forwardv", registers=128, spilled=104, stack=88, shared=16),
        Kernel("_Z8backwardv", registers=97, spilled=0, stack=0, shared=0),
    ]


def test_units_that_fit_a_gpu():
    """A block has at most 8 units, and every multiprocessor one block."""
    h100, rtx_3090 = GPUS["90"], GPUS["86"]
    assert compile_cuda.largest_units(h100, 32, in_bfloat16=True) == 8 * 132
    # A column of the recurrent kernel is 4 bytes a row: a block of 8 units has 8 * 4 of them.
    units = compile_cuda.largest_units(rtx_3090, 128, in_bfloat16=False)
    assert 8 * 4 * 4 * units < rtx_3090.shared_memory and units < 8 * 82
    assert compile_cuda.largest_units(h100, 128, in_bfloat16=False) == 8 * 132  # told again


@pytest.mark.long
@pytest.mark.parametrize("architecture", GPUS)
def test_compiles_with_nearly_all_values_in_registers(architecture):
    try:
        known = compile_cuda.known_architectures()
    except RuntimeError as error:
        pytest.skip(str(error))
    if architecture not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    kernels = compile_cuda.kernels(architecture)
    assert len(kernels) == 36  # both passes and dtypes; 2, 4 and 8 units of a block; 3 batches
    # Blocks of 512 threads have 128 registers a thread: some are written to memory there.
    assert max(kernel.spilled for kernel in kernels) <= 160
    assert max(kernel.registers for kernel in kernels) <= 255
