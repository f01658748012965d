"""The measuring loop, on a clock that only the runners move."""

from __future__ import annotations

import pytest

from slope_compile.bench.measure import Plan, in_turn, measure_round, warm_up


class Machine:
    """A clock, and runners whose work moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.trace: list[str] = []

    def clock(self) -> float:
        return self.now


class FakeRunner:
    def __init__(self, machine: Machine, name: str, work: float, overhead: float = 0.0, cold: int = 0) -> None:
        self.machine, self.name, self.work, self.overhead, self.cold = machine, name, work, overhead, cold
        self.queued = 0

    def launch(self) -> None:
        self.queued += 1
        self.machine.trace.append(self.name)

    def wait(self) -> None:
        slow = 10 if self.cold > 0 else 1
        self.cold -= self.queued
        self.machine.now += self.queued * self.work * slow + self.overhead
        self.queued = 0


PLAN = Plan(rounds=3, warm_up_s=0.05, round_s=0.1, least=4, most=50)


def test_latency_and_throughput() -> None:
    machine = Machine()
    found = measure_round(FakeRunner(machine, "a", 0.01, overhead=0.002), PLAN, machine.clock)
    assert found.latencies == pytest.approx([0.012] * 8)  # 0.1 s of them
    assert found.per_second == pytest.approx(8 / (8 * 0.01 + 0.002))  # launched back to back, waited for once


def test_the_warm_up_is_not_counted() -> None:
    machine = Machine()
    found = measure_round(FakeRunner(machine, "a", 0.001, cold=4), PLAN, machine.clock)
    assert max(found.latencies) == pytest.approx(0.001)


def test_rounds_alternate_and_each_is_warmed_up() -> None:
    machine = Machine()
    runners = {name: FakeRunner(machine, name, 0.01) for name in "ab"}
    rounds = in_turn(runners, PLAN, machine.clock)
    assert {name: len(of) for name, of in rounds.items()} == {"a": 3, "b": 3}
    turns = [machine.trace[0], *(b for a, b in zip(machine.trace, machine.trace[1:], strict=False) if a != b)]
    assert turns == ["a", "b"] * 3
    assert machine.trace.count("a") == 3 * (5 + 10 + 10)  # warm-up, latency, throughput


@pytest.mark.parametrize(("work", "count"), [(1.0, 4), (1e-6, 50), (0.02, 5)])
def test_few_slow_and_many_fast_inferences(work: float, count: int) -> None:
    machine = Machine()
    assert len(measure_round(FakeRunner(machine, "a", work), PLAN, machine.clock).latencies) == count


def test_a_clock_that_stands_still_ends_the_warm_up_too() -> None:
    machine = Machine()
    runner = FakeRunner(machine, "a", 0.0)
    assert warm_up(runner, PLAN, machine.clock) == 0.0
    assert len(machine.trace) == PLAN.most
    assert measure_round(runner, PLAN, machine.clock).per_second == float("inf")
