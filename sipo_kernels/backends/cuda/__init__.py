"""The pair loss as CUDA kernels, called through the native library."""
