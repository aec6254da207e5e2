"""The Gymnasium face of every family: ``import ecomlib.gym`` registers ``ecomlib/Pricing-v0`` and the others.

::

    import gymnasium
    import ecomlib.gym

    one = gymnasium.make("ecomlib/Pricing-v0", days=7, oracle=True)
    many = gymnasium.make_vec("ecomlib/Pricing-v0", num_envs=4096)  # one batch, no loop over environments

``gymnasium.make("ecomlib.gym:ecomlib/Pricing-v0")`` does both. The rules are in ``TaskEnv`` and ``TaskVectorEnv``.
"""

import gymnasium

from .environments import TaskEnv, TaskVectorEnv
from .rows import FAMILIES
from .spaces import distinct

__all__ = ["FAMILIES", "TaskEnv", "TaskVectorEnv", "distinct"]

for _name in FAMILIES:
    gymnasium.register(
        f"ecomlib/{_name}-v0",
        entry_point="ecomlib.gym:TaskEnv",
        vector_entry_point="ecomlib.gym:TaskVectorEnv",
        kwargs={"family": _name},
    )
