"""Aymen-GPT: text to a trained, scored GPT-2/GPT-3. docs/architecture.md is the map of this package."""

__version__ = "0.1.0"
