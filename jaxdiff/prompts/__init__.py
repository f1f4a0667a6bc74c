"""Prompts as text: weights, schedules, AND, wildcards, and as many tokens as it takes; NumPy only."""

from jaxdiff.prompts.encode import Prompts, Words, encode, fill
from jaxdiff.prompts.grammar import parse
from jaxdiff.prompts.wildcards import Wildcards

__all__ = ["Prompts", "Wildcards", "Words", "encode", "fill", "parse"]
