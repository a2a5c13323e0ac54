"""Weight-only matmuls for GPUs in Triton: operators (`operators`), their tiles (`tiles`), the kernels (`kernels`)."""

from .operators import GPUS, WEIGHT_ONLY, missing

__all__ = ["GPUS", "WEIGHT_ONLY", "missing"]
