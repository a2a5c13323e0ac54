"""Numbers of things in messages and tables: `1 weight`, `2 weights`."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """`counted(1, "FP8 weight")` is `1 FP8 weight`; of any other number the thing ends in s."""
    return f"{number} {thing}{'s' * (number != 1)}"


def agreeing(number: int, one: str, several: str) -> str:
    """The verb or pronoun that goes with a number of things: `agreeing(n, "is", "are")`."""
    return one if number == 1 else several


def such_as(number: int, thing: str, name: object) -> str:
    """The subject of a sentence, by one of several: `weight a`, or `3 weights, such as a,`."""
    return f"{thing} {name}" if number == 1 else f"{counted(number, thing)}, such as {name},"
