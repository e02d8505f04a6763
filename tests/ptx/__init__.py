"""A PTX interpreter: runs the kernels that nvcc and Triton compile, on a CPU, with checks.

The threads of a few blocks run together, each instruction at once as a NumPy operation with one
array lane for each thread. Where threads diverge, those that are furthest behind in the code run
first, and meet the others where they wait. Arithmetic is what the PTX ISA says, to the bit;
approximate instructions are rounded correctly, then moved by a chosen part of their documented
error. Whatever a GPU would leave undefined is an error that names the instruction and the thread:
registers and shared memory that nobody wrote, accesses out of bounds or misaligned, races on shared
memory, barriers and shuffles that not all threads reach. So is whatever this package does not know.
Global memory is NumPy arrays, with bounds, write counts and traffic; races on it show as bytes that
are not written exactly once. Not modelled: timing, caches, memory ordering, what ptxas does.
"""

from . import forms_arithmetic, forms_data  # noqa: F401  (they fill the table of decode.py)
from .errors import PTXError
from .machine import Machine
from .memory import Memory, Stats
from .model import Kernel
from .parse import Module

__all__ = ["Kernel", "Machine", "Memory", "Module", "PTXError", "Stats"]
