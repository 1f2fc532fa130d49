"""The passes that ship with graphopt. They register through ``graphopt_passes.plugin``."""
