"""The graphs that are run, as bare numbers: every contestant is given the same edges."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

__all__ = ["SHAPES", "Shape", "chain", "diamond", "fan", "layered", "shape"]

SEED = 20
"""Of the random edges of a layered shape, so that every process draws the same ones."""
INPUTS = 3


@dataclass(frozen=True)
class Shape:
    """A graph. Stages are numbered in topological order.

    Attributes:
        name: What it is called.
        size: The size it was asked for, which is not always its number of stages.
        dependencies: The stages each stage comes after.
    """

    name: str
    size: int
    dependencies: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.dependencies)

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        """The stages that come after each stage."""
        followers: list[list[int]] = [[] for _ in self.dependencies]
        for number, before in enumerate(self.dependencies):
            for other in before:
                followers[other].append(number)
        return tuple(map(tuple, followers))

    @cached_property
    def waits(self) -> tuple[int, ...]:
        """How many stages each stage waits for."""
        return tuple(len(before) for before in self.dependencies)

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """The stages that wait for none."""
        return tuple(number for number, before in enumerate(self.dependencies) if not before)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The stages that none waits for."""
        return tuple(number for number, after in enumerate(self.followers) if not after)

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The stages by the length of the longest way to them."""
        depth: list[int] = []
        layers: list[list[int]] = []
        for number, before in enumerate(self.dependencies):
            depth.append(max((depth[other] + 1 for other in before), default=0))
            if depth[number] == len(layers):
                layers.append([])
            layers[depth[number]].append(number)
        return tuple(map(tuple, layers))

    @cached_property
    def strands(self) -> tuple[tuple[int, ...], ...]:
        """The stages in lines: each of a line is the only one after the one before, and waits for nothing else."""
        lines: dict[int, list[int]] = {}
        line_of: dict[int, list[int]] = {}
        for number, before in enumerate(self.dependencies):
            if len(before) == 1 and len(self.followers[before[0]]) == 1:
                line_of[number] = line_of[before[0]]
                line_of[number].append(number)
            else:
                line_of[number] = lines[number] = [number]
        return tuple(map(tuple, lines.values()))


def chain(size: int) -> Shape:
    """`size` stages, one after the other."""
    return Shape("chain", size, ((), *((number,) for number in range(size - 1))))


def fan(size: int) -> Shape:
    """One stage, `size` after it, and one after all of those."""
    return Shape("fan", size, ((), *([(0,)] * size), tuple(range(1, size + 1))))


def layered(size: int) -> Shape:
    """`size` layers of `size` stages, each after three random ones of the layer before."""
    draw = random.Random(SEED)
    dependencies: list[tuple[int, ...]] = [()] * size
    for layer in range(1, size):
        before = range((layer - 1) * size, layer * size)
        dependencies += [tuple(sorted(draw.sample(before, min(INPUTS, size)))) for _ in range(size)]
    return Shape("layered", size, tuple(dependencies))


def diamond(size: int) -> Shape:
    """One stage, `size` after it, and one after all of those: five stages, if `size` is 3."""
    return Shape("diamond", size, fan(size).dependencies)


SHAPES = {"chain": chain, "fan": fan, "layered": layered, "diamond": diamond}


def shape(name: str, size: int) -> Shape:
    """Give a shape by its name."""
    return SHAPES[name](size)
