"""Optimized modules as folders: ``Optimized.save`` writes one, ``graphopt.load`` runs it (docs/artefacts.md).

Nothing in an artefact is code that is run: graphs are JSON whose operators have to be registered already,
weights are safetensors, and what runs is compiled here, anew, by the emitter that made it.
"""
