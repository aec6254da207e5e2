"""Learning algorithms, one file each."""

from .reinforce import Reinforce, ReinforceConfig

__all__ = ["Reinforce", "ReinforceConfig"]
