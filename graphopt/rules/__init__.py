"""Declarative rewrites: a pattern, a replacement and a guard, each a plain function bound by the names of
its arguments (docs/rules.md)."""

from graphopt.rules.matching import argument
from graphopt.rules.pattern import either, operator
from graphopt.rules.rewrite import Match, RewritePass, Rule

__all__ = ["Match", "RewritePass", "Rule", "argument", "either", "operator"]
