"""The measuring loop: runners in turn, round after round, each warmed up anew; a clock is all it knows of the machine.

Clocks of a GPU move with its temperature. Measured one after the other, the first engine gets the cool GPU; so the
rounds of all alternate (A B A B …), and what is compared are rounds that lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Clock = Callable[[], float]  # seconds


class Runner(Protocol):
    """Something that runs one inference."""

    def launch(self) -> None:
        """Start one inference; it may go on after this returns."""

    def wait(self) -> None:
        """Return when everything that was started is done."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        rounds: Rounds of each runner.
        warm_up_s: Seconds of inferences before each round, not counted.
        round_s: Seconds that the counted inferences of a round should take, for latency and for throughput each.
        least: Inferences of a round, at least.
        most: At most.
    """

    rounds: int = 10
    warm_up_s: float = 0.3
    round_s: float = 0.5
    least: int = 20
    most: int = 2000


@dataclass(frozen=True)
class Round:
    """What one round measured.

    Args:
        latencies: Seconds of each inference, from its launch until it is done; one at a time.
        per_second: Inferences a second when they are launched back to back.
    """

    latencies: tuple[float, ...]
    per_second: float


def in_turn(runners: Mapping[str, Runner], plan: Plan, clock: Clock) -> dict[str, list[Round]]:
    """Return the rounds of each runner, measured in turn.

    Args:
        runners: By name; the order is the order of each turn.
        plan: How much is measured.
        clock: Seconds, monotonic.
    """
    rounds: dict[str, list[Round]] = {name: [] for name in runners}
    for _ in range(plan.rounds):
        for name, runner in runners.items():
            rounds[name].append(measure_round(runner, plan, clock))
    return rounds


def measure_round(runner: Runner, plan: Plan, clock: Clock) -> Round:
    """Warm up, then measure latency, then throughput."""
    each = warm_up(runner, plan, clock)
    count = max(plan.least, min(plan.most, round(plan.round_s / each) if each > 0 else plan.most))
    latencies = []
    for _ in range(count):
        started = clock()
        runner.launch()
        runner.wait()
        latencies.append(clock() - started)
    started = clock()
    for _ in range(count):
        runner.launch()
    runner.wait()
    elapsed = clock() - started
    return Round(tuple(latencies), count / elapsed if elapsed > 0 else float("inf"))


def warm_up(runner: Runner, plan: Plan, clock: Clock) -> float:
    """Run until the warm-up time is over, and return the seconds that one inference took at the end."""
    started = now = clock()
    runs = 0
    each = 0.0
    while now - started < plan.warm_up_s and runs < plan.most:
        runner.launch()
        runner.wait()
        before, now = now, clock()
        each = now - before
        runs += 1
    return each
