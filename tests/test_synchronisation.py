"""No hidden wait for the device: families, rollouts and learners never look at a value on the host, nor copy numbers to
the device, but in the functions named here, each with its reason. ``tests/test_cuda.py`` checks the same on a GPU."""

import ast

import pytest
import torch
from notebooks import ROOT

from ecomlib.families import LogitPricing
from ecomlib.families.constants import constant
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, ReinforceStep, ReptileStep
from ecomlib.learners.finite import Checks, check_finite, deferred
from ecomlib.policies import CategoricalMLP

PATHS = sorted(path for folder in ("ecomlib/families", "ecomlib/learners") for path in (ROOT / folder).glob("*.py")) + [
    ROOT / "ecomlib" / name for name in ("rollout.py", "returns.py", "surrogates.py", "noise.py", "policies.py")
]

METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "new_tensor"}
"""Methods that wait for the device, or whose result's shape has to."""
FUNCTIONS = {"torch.tensor", "torch.as_tensor", "torch.linalg.solve", "torch.linalg.inv", "torch.linalg.cholesky"}
"""Copies from the host, and functions that check their result on it."""
CONVERSIONS, REDUCTIONS = {"float", "int", "bool"}, {"any", "all", "isfinite", "equal", "is_nonzero"}
"""Python's numbers of what is computed; truth values of what is."""

PLANNING = "the planning of an oracle, a blind policy or a summary: once a family, never in a rollout"
SETTINGS = "settings, which are not on a device"
ALLOWED = {
    "families/base.py::_plain": SETTINGS,
    "families/base.py::number": SETTINGS,
    "families/constants.py::constant": "a constant of a compiled function, part of its code",
    "families/constants.py::_constant": "a copy from the host, once a process",
    "families/bandits.py::_beta_quantile": "a prior that has no closed quantiles, once a task",
    "families/navigation.py::PointNavigation.test_goals": "the published goals, once",
    "families/pricing.py::LogitPricing.oracle_markup": PLANNING,
    "families/shelf.py::best_table": PLANNING,
    "families/bidding.py::blind_policy": PLANNING,
    "learners/finite.py::Checks.read": "the one transfer of an iteration",
    "learners/finite.py::Checks._refuse": "what was read is on the host",
    "learners/maml.py::compact": "its shapes depend on when episodes end; ``MAMLConfig.compact`` is off by default",
    "learners/meta.py::MetaLearner.draw": "made on the host and sent from page-locked memory",
    "learners/ppo.py::PPO.update": "leaves the epochs early where all tasks reached ``target_kl``, None by default",
    "learners/ppo.py::PPO.train": "the progress bar",
    "learners/trpo.py::TRPO.train": "the progress bar",
    "learners/trpo.py::conjugate_gradient": "stops when all systems are solved",
    "learners/trpo.py::trust_region_step": "the line search is decided on the host",
    "learners/trpo.py::trust_region_step.values": "the line search is decided on the host",
    "rollout.py::rollout_transitions": "plays until each task has its transitions: shapes depend on what is played",
    "rollout.py::_rollout_compacted": "leaves out what comes after an episode's end: shapes depend on what is played",
}
TABULAR = "tabular worlds are planned and enumerated on the host: " + PLANNING


class Looks(ast.NodeVisitor):
    """(function, line, expression) of everything in a file that would wait for the device."""

    def __init__(self):
        self.scope, self.found = [], []

    def visit_FunctionDef(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_ClassDef = visit_FunctionDef

    def note(self, node):
        self.found.append((".".join(self.scope), node.lineno, ast.unparse(node)))

    def visit_Call(self, node):
        name = ast.unparse(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        literal = all(isinstance(argument, ast.Constant) for argument in node.args)
        if method in METHODS or name in FUNCTIONS or (name in CONVERSIONS and not literal):
            self.note(node)
        self.generic_visit(node)

    def truth(self, node):
        """``node`` is used as a truth value: a reduction in it would have to be known."""
        if isinstance(node, ast.BoolOp):
            [self.truth(value) for value in node.values]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.truth(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS:
            self.note(node)

    def visit_If(self, node):
        self.truth(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_Assert = visit_If

    def visit_comprehension(self, node):
        [self.truth(test) for test in node.ifs]
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        self.truth(node)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.truth(node)
        self.generic_visit(node)


def looks(source):
    visitor = Looks()
    visitor.visit(ast.parse(source))
    return visitor.found


def everywhere():
    for path in PATHS:
        name = path.relative_to(ROOT / "ecomlib").as_posix()
        for function, line, expression in looks(path.read_text(encoding="utf-8")):
            yield f"{name}::{function}", line, expression


def allowed(place):
    return place in ALLOWED or place.startswith("families/tabular.py::")


def test_nothing_else_waits_for_the_device():
    found = [f"{place}, line {line}: {expression}" for place, line, expression in everywhere() if not allowed(place)]
    assert not found, "\n".join(found)


def test_every_exception_is_needed():
    places = {place for place, _, _ in everywhere()}
    assert set(ALLOWED) <= places


def test_tabular_worlds_are_not_excepted_where_they_are_played():
    played = ("tasks", "reset", "observe", "step", "context")
    found = [place for place, _, _ in everywhere() if place.startswith("families/tabular.py::")]
    assert found and not [place for place in found if place.rsplit(".", 1)[-1] in played]


@pytest.mark.parametrize(
    "line",
    [
        "x.sum().item()",
        "x.cpu()",
        "x.tolist()",
        "float(x.mean())",
        "bool(x > 0)",
        "int(mask.sum())",
        "1 if x.any() else 0",
        "not x.isfinite().all()",
        "[y for y in x if y.any()]",
        "torch.tensor([1.0, 2.0], device=x.device)",
        "x.new_tensor(weights)",
        "torch.linalg.solve(a, b)",
    ],
)
def test_the_check_sees(line):
    assert looks(f"def f(x):\n    y = {line}\n") and not looks("def f(x):\n    y = float('inf') + x.any(-1)\n")


# ------------------------------------------------------------------------------------------- what is read, and when
FAMILY = LogitPricing(days=3)


class Looked(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the values that the host looks at."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "_local_scalar_dense" in str(function):
            self.count += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("seed", [0, (0, 1)])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("outer", [ReinforceStep(), PPOStep(epochs=2), ReptileStep()])
def test_an_iteration_looks_at_no_value_before_its_end(outer, by_hand, seed):
    """Adam's step counts, which torch keeps on the host, and nothing else."""
    maml = MAML(CategoricalMLP((6, 4, 11)), Inner(steps=2), outer, MAMLConfig(3, 4, by_hand=by_hand))
    state = maml.meta_train(FAMILY, seed, 1, progress=False)
    with deferred() as checks:
        with Looked() as looked:
            objective = maml.objective(FAMILY, state.meta, seed, 1)
            _, _, log = maml.outer.update(objective, state.meta, state.memory)
        adam = 0 if state.memory is None else len(state.meta) * (outer.epochs if hasattr(outer, "epochs") else 1)
        assert looked.count == adam
        assert all(isinstance(value, torch.Tensor) for value in log.values())
        read = checks.read(log)
    assert all(isinstance(value, float) for value in read.values()) or seed == (0, 1)


def test_checks_are_read_together_and_in_order():
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="^first of task 1, tensor 1, is not finite"), deferred():
        check_finite("first", [good, bad])
        check_finite("second", [bad])
        reached = True
    assert reached
    with pytest.raises(FloatingPointError, match="^first of task 1"), deferred():
        check_finite("first", [bad])
        raise RuntimeError("what it led to")
    with pytest.raises(RuntimeError, match="something else"), deferred():
        check_finite("first", [good])
        raise RuntimeError("something else")
    with deferred() as checks:
        check_finite("first", [good])
        assert checks.read({"x": torch.tensor(2.0), "y": torch.tensor([1.0, 3.0]), "z": True}) == {
            "x": 2.0,
            "y": [1.0, 3.0],
            "z": 1.0,
        }
    assert Checks().read() == {}


def test_large_values_are_finite():
    """A sum of what is finite may overflow; that is no failure."""
    check_finite("gradient", [torch.full((3, 4), torch.finfo(torch.float64).max)])
    check_finite("gradient", [torch.full((3, 4), torch.finfo(torch.float64).max)], tasks=False)


def test_nothing_is_seen_of_an_iteration_that_failed():
    """Neither the callback nor the history gets a state with a value that is not finite."""
    maml = MAML(CategoricalMLP((6, 4, 11)), Inner(), PPOStep(epochs=2), MAMLConfig(3, 4))
    start = maml.meta_train(FAMILY, 0, 1, progress=False)
    start.meta[0][0, 0] = torch.nan
    seen = []
    with pytest.raises(FloatingPointError, match="PPO-MAML, iteration 1: inner gradient at step 0 of task 0, tensor 0"):
        maml.meta_train(FAMILY, 0, 2, start=start, progress=False, callback=seen.append)
    assert seen == [] and len(start.history) == 1


def test_a_constant_is_made_once():
    like = torch.zeros(2)
    assert constant((1.0, 2.0), like) is constant((1.0, 2.0), like)
    assert constant((1.0, 2.0), like.float()).dtype == torch.float32
    with torch.inference_mode():
        made = constant((3.0, 4.0), like)
    assert not made.is_inference()
