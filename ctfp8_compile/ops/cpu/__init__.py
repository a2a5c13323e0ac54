"""C++ kernels that dequantize FP8 weights while they multiply, for CPUs."""

from .build import KernelBuildError as KernelBuildError
from .build import isa as isa
from .build import load as load
from .build import loaded as loaded
