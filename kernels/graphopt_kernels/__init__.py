"""The kernels that ship with graphopt. They register through ``graphopt_kernels.plugin``."""
