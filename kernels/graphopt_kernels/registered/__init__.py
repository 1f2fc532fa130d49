"""What the package registers, by what it is for: a file for each, of ``KERNELS``."""
