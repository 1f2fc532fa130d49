"""Code generators: what runs a lowered program."""
