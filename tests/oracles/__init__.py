# SPDX-License-Identifier: Apache-2.0
"""What all tests of a backend share: how inputs are made, what the result is, how far from it one may be.

``Case`` describes a call, ``make`` draws its inputs, ``run`` calls a backend, ``exact`` is the float64 result by an
independent road (complex numbers and autograd), ``check`` is the error rule.
"""

from .exact import Exact, exact, pair_channels
from .inputs import SEED, Case, Inputs, generator, make
from .kernels import CPU_KERNELS, KERNELS, Kernel, distinct_kernels, threads
from .rule import check, check_bound, run

__all__ = [
    "CPU_KERNELS",
    "KERNELS",
    "SEED",
    "Case",
    "Exact",
    "Inputs",
    "Kernel",
    "check",
    "check_bound",
    "distinct_kernels",
    "exact",
    "generator",
    "make",
    "pair_channels",
    "run",
    "threads",
]
