"""Passes that change the model before it is captured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.passes import Pass, PassContext, Proposal
from graphopt.program import Program

__all__ = ["Conversion"]
