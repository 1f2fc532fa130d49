"""A planner policy for graphopt that frees memory where time is cheap."""
