"""The CUDA backend: Triton kernels in place of the torch backend's ops, where there are some."""
