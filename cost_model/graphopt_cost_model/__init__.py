"""The cost model that ships with graphopt. It registers through ``graphopt_cost_model.plugin``."""
