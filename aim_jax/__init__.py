"""Continual learning for language models in JAX, with AimMerging at its heart."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used; the message names the culprit and the cure."""
