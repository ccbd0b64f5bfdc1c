"""What an assignment's checks.py is written in: tasks, checks worth points, and comparisons that explain themselves.

    A = Assignment("a1", "Scores and the DMD gradient", constants, {"A1.1": "score of a Laplace density"})

    @A.check("A1.1", points=5)
    def odd(student, c):
        '''The score of a symmetric density is odd.'''
        x = torch.tensor([0.3 * c.scale])
        close(student.laplace_score(-x, c.scale), -student.laplace_score(x, c.scale), "score(-x)")

A check gets the student's module (when graded, a stand-in for it: remote.py) and the constants, passes by returning and
fails by raising; its docstring is its title. Students may read all of this: hidden tests are the same checks at the constants
of another seed.
"""

import random
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch

PUBLIC_SEED = 0


class Check(NamedTuple):
    task: str
    points: float
    run: Callable                   # (student module, constants) -> None, or raises
    writes: bool = False            # may the student's code change values of what it is given?

    @property
    def title(self):
        return " ".join(self.run.__doc__.split())


class Assignment:
    """name 'a1'; constants(rng: random.Random) -> dict of numbers; tasks {number: title} in the order of the handout.

    seconds (CPU time) and mebibytes (memory beyond what torch itself takes) are the limits of one task.
    """

    def __init__(self, name, title, constants, tasks, seconds=20, mebibytes=1500):
        self.name, self.title, self.draw, self.tasks = name, title, constants, tasks
        self.seconds, self.mebibytes, self.checks = seconds, mebibytes, []

    def constants(self, seed):
        """The numbers of one seed as attributes; c.noise(*shape) draws unit normal float64 noise, the same every time."""
        c = SimpleNamespace(**self.draw(random.Random(seed)))
        generator = torch.Generator().manual_seed(seed)
        c.noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        return c

    def check(self, task, points, writes=False):
        """Decorator: one check of a task, run in the order of definition.  writes: the task is to change an argument."""
        if task not in self.tasks:
            raise ValueError(f"{self.name} has no task {task!r}, only {', '.join(self.tasks)}")

        def add(function):
            self.checks.append(Check(task, points, function, writes))
            return function
        return add

    def of(self, task):
        return [check for check in self.checks if check.task == task]

    def points(self, task):
        return sum(check.points for check in self.of(task))


def tensor(got, shape, what):
    """got itself; fails with a sentence unless it is a finite tensor of that shape."""
    if not isinstance(got, torch.Tensor):
        raise AssertionError(f"{what} should be a tensor, got {type(got).__name__}")
    if tuple(got.shape) != tuple(shape):
        raise AssertionError(f"{what} should have shape {tuple(shape)}, got {tuple(got.shape)}")
    if not got.isfinite().all():
        raise AssertionError(f"{what} holds {got[~got.isfinite()][0].item()}: it must be finite everywhere")
    return got


def close(got, want, what, rtol=1e-6, atol=1e-8, hint=""):
    """Fail unless got (a number or a tensor) equals want within atol + rtol * |want|, and say where it is furthest off."""
    want = torch.as_tensor(want, dtype=torch.float64)
    got = torch.as_tensor(got, dtype=torch.float64) if isinstance(got, (int, float)) else got
    got = tensor(got, want.shape, what).detach()
    kind, got = got.dtype, got.double()
    excess = ((got - want).abs() - rtol * want.abs() - atol).flatten()
    if excess.max() > 0:
        worst = excess.argmax()
        got, want = got.flatten()[worst].item(), want.flatten()[worst].item()
        digits = next((d for d in (6, 9, 12) if f"{got:.{d}g}" != f"{want:.{d}g}"), 17)
        size = f"relative error {abs(got / want - 1):.2g}" if want and abs(got / want) < 1e9 else f"error {abs(got - want):.2g}"
        raise AssertionError(f"{what} is {got:.{digits}g} where {want:.{digits}g} is right{'; ' + hint if hint else ''} "
                             f"({size}{'' if kind == torch.float64 else ', in ' + str(kind)[6:]})")


def gradient(value, x, what):
    """d value.sum() / dx; fails with a sentence where value does not depend on x or carries no graph."""
    found = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise AssertionError(f"{what} does not depend on its input: no gradient reaches it")
    return found


def holds(condition, message):
    """assert with a sentence for the student."""
    if not condition:
        raise AssertionError(message)
