"""The pair loss as Triton kernels."""
