"""Compiling for accelerators that this machine does not have."""

from pallas_kernels.aot.compile import compile_for
from pallas_kernels.aot.compile import Report
from pallas_kernels.aot.compile import report
from pallas_kernels.aot.target import compiling_for
from pallas_kernels.aot.target import platform
