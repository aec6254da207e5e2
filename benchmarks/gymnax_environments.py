"""Two of the library's families as environments of gymnax, and two of gymnax's own, timed in a Python that has gymnax.

``benchmarks.environments`` starts this file with that interpreter and sends it one JSON object a line: what to time, or
a file of uniforms to play, whose results must be those of the library. Nothing of the library is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment

SMALL_MEAN, TERMS = 6.0, 26  # as in ecomlib.families.demand


# ------------------------------------------------------------------------------------------ finite-stock pricing
@struct.dataclass
class Market:
    sensitivity: jax.Array
    utility: jax.Array
    traffic: jax.Array
    cost: jax.Array


@struct.dataclass
class Shelf:
    day: jax.Array
    markup: jax.Array
    sold: jax.Array
    stock: jax.Array


class Pricing(environment.Environment):
    """``LogitPricing`` with a stock limit."""

    parameters = Market

    def __init__(self, days: int, markups: list, weekday: list, stock: int, mean_traffic: float):
        self.days, self.stock, self.mean_traffic = days, stock, mean_traffic
        self.markups, self.weekday = jnp.array(markups), jnp.array(weekday)

    def reset_env(self, key, params):
        zero = jnp.zeros(())
        state = Shelf(zero, zero, zero, zero + self.stock)
        return self.get_obs(state, params), state

    def get_obs(self, state, params, key=None):
        weekday = self.weekday[state.day.astype(jnp.int32) % len(self.weekday)]
        sold, stock = state.sold / self.mean_traffic, state.stock / self.stock
        return jnp.stack([state.day / self.days, params.cost, weekday, state.markup, sold, stock])

    def step_env(self, key, state, action, params):
        return self.play(jax.random.uniform(key), state, action, params)

    def play(self, uniform, state, action, params):
        markup = self.markups[action]
        weekday = self.weekday[state.day.astype(jnp.int32) % len(self.weekday)]
        share = jax.nn.sigmoid(params.utility - params.sensitivity * markup)
        sold = jnp.minimum(poisson_inverse(uniform, params.traffic * weekday * share), state.stock)
        state = Shelf(state.day + 1, markup, sold, state.stock - sold)
        return self.get_obs(state, params), state, params.cost * (markup - 1) * sold, state.day >= self.days, {}


def poisson_inverse(uniform, mean):
    """``ecomlib.families.demand.poisson_inverse``."""
    small = jnp.minimum(mean, SMALL_MEAN)
    term = total = jnp.exp(-small)
    count = (uniform > term).astype(mean.dtype)
    for k in range(1, TERMS):
        term = term * (small / k)
        total = total + term
        count = count + (uniform > total)
    lam = jnp.maximum(mean, SMALL_MEAN)
    root, w = jnp.sqrt(lam), jax.scipy.special.ndtri(uniform)
    square = w * w
    large = (lam + root * w + (2 + square) / 6 - (w / 36 + w * square / 72) / root
             + (-8 / 405 + 7 * square / 810 + square * square / 270) / lam)  # fmt: skip
    return jnp.where(mean > SMALL_MEAN, jnp.maximum(jnp.floor(large), 0), count)


# ------------------------------------------------------------------------------------------ censored inventory
@struct.dataclass
class Product:
    price: jax.Array
    holding: jax.Array
    staircase: jax.Array


@struct.dataclass
class Stock:
    day: jax.Array
    stock: jax.Array
    available: jax.Array
    sold: jax.Array


class Inventory(environment.Environment):
    """``CensoredInventory`` without lead time, season, regimes and penalty."""

    parameters = Product

    def __init__(self, days: int, levels: list):
        self.days, self.levels = days, jnp.array(levels, dtype=jnp.float32)

    def reset_env(self, key, params):
        zero = jnp.zeros(())
        state = Stock(zero, zero, zero, zero)
        return self.get_obs(state, params), state

    def get_obs(self, state, params, key=None):
        units = jnp.log1p(jnp.stack([state.stock, state.available, state.sold]))
        sold_out = (state.sold >= state.available) & (state.day > 0)
        safety = jax.scipy.special.ndtri((params.price - 1) / (params.price - 1 + params.holding))
        seen = jnp.stack([state.day / self.days, params.price, params.holding, safety, jnp.ones(())])
        return jnp.concatenate([seen, units, sold_out.astype(units.dtype)[None]])

    def step_env(self, key, state, action, params):
        return self.play(jax.random.uniform(key), state, action, params)

    def play(self, uniform, state, action, params):
        demand = jnp.searchsorted(params.staircase, uniform).astype(jnp.float32)
        available = state.stock + jnp.maximum(self.levels[action] - state.stock, 0)
        sold = jnp.minimum(demand, available)
        left = available - sold
        reward = (params.price - 1) * sold - params.holding * left
        state = Stock(state.day + 1, left, available, sold)
        return self.get_obs(state, params), state, reward, state.day >= self.days, {}


# ------------------------------------------------------------------------------------------ timing
def replayed(env, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Observations and rewards (T, M, ...) of given actions and uniforms (T, M) and parameters (M, ...)."""
    params = env.parameters(*(jnp.asarray(data[name]) for name in env.parameters.__dataclass_fields__))
    observation, state = jax.vmap(env.reset_env, (None, 0))(jax.random.key(0), params)

    def day(state, luck):
        observation, state, reward, _, _ = jax.vmap(env.play)(luck[0], state, luck[1], params)
        return state, (observation, reward)

    _, (observations, rewards) = jax.lax.scan(day, state, (data["uniform"], data["action"]))
    return {"observation": np.asarray(observations), "reward": np.asarray(rewards)}


def episode(env, params, actions: jax.Array, shared: bool):
    """A jitted function that plays T steps of M environments in one scan, each with a key of its own, and how many
    steps that is. It does not reset what ends, and gives back the last observations and all rewards."""
    axis = None if shared else 0
    steps, batch = actions.shape[:2]
    reset, step = jax.vmap(env.reset_env, (0, axis)), jax.vmap(env.step_env, (0, 0, 0, axis))

    def day(carry, luck):
        observation, state, reward, done, _ = step(jax.random.split(luck[0], batch), carry[1], luck[1], params)
        return (observation, state), (reward, done)

    @jax.jit
    def play(key):
        start = reset(jax.random.split(key, batch), params)
        return jax.lax.scan(day, start, (jax.random.split(key, steps), actions))

    return play, steps * batch


def variant(order: dict, batch: int):
    """The episode that an order names, with parameters in the range of the library's."""
    rng, name, steps = np.random.default_rng(0), order["name"], order["steps"]
    if name in ("Pricing", "Inventory"):
        env = globals()[name](**order["settings"])
        params = env.parameters(*(jnp.asarray(np.load(order["parameters"])[field][:batch]) for field in
                                  env.parameters.__dataclass_fields__))  # fmt: skip
        actions = rng.integers(order["actions"], size=(steps, batch))
        return episode(env, params, jnp.asarray(actions), shared=False)
    env, params = gymnax.make(name)
    box = rng.uniform(-0.1, 0.1, (steps, batch, 2)).astype(np.float32)
    actions = box if order["actions"] == 0 else rng.integers(order["actions"], size=(steps, batch))
    return episode(env, params, jnp.asarray(actions), shared=True)


def main() -> None:
    variants = {}
    print(json.dumps({name: version(name) for name in ("gymnax", "jax", "jaxlib")}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "replay" in order:
            env = globals()[order["name"]](**order["settings"])
            np.savez(order["result"], **replayed(env, dict(np.load(order["replay"]))))
            print(json.dumps({"replayed": True}), flush=True)
            continue
        key = order["name"], order["batch"]
        if key not in variants:
            variants[key] = variant(order, order["batch"])
            jax.block_until_ready(variants[key][0](jax.random.key(0)))
        play, steps = variants[key]
        calls, start = 0, time.process_time()
        while calls == 0 or time.process_time() - start < order["least"]:
            jax.block_until_ready(play(jax.random.key(calls)))
            calls += 1
        print(json.dumps({"seconds": (time.process_time() - start) / calls, "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
