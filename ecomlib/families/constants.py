"""A family's numbers as tensors, copied to a device once: a copy from the host makes a GPU's queue wait."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def constant(values: tuple, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` (nested tuples of numbers) on the device of ``like``, in its type unless ``dtype`` is given.

    Every call returns the same tensor: do not write to it.
    """
    if torch.compiler.is_compiling():  # the compiler keeps constants itself
        return torch.tensor(values, device=like.device, dtype=dtype or like.dtype)
    return _constant(values, like.device, dtype or like.dtype)


@lru_cache(maxsize=256)
def _constant(values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not take part in gradients later
        return torch.tensor(values, device=device, dtype=dtype)
