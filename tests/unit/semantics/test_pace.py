import asyncio
import time

from distrl.semantics.asked import Asked
from distrl.semantics.describe_config import BudgetConfig, PricesConfig
from distrl.semantics.pace import Estimate, Pace, Purse


def purse(**budget):
    asked = Asked(total=0)
    prices = PricesConfig(input_per_million=1.0, output_per_million=10.0)
    return Purse(BudgetConfig(**budget), prices, asked), asked


def test_a_pace_flows_evenly_without_a_burst():
    async def taken():
        pace, start = Pace(600), time.monotonic()
        for _ in range(6):
            await pace.take(1)
        return time.monotonic() - start

    assert 0.49 < asyncio.run(taken()) < 3


def test_what_was_not_needed_flows_to_others():
    async def waited():
        pace, start = Pace(600), time.monotonic()
        await pace.take(100)
        pace.give_back(98)
        await pace.take(1)
        return time.monotonic() - start

    assert 0.19 < asyncio.run(waited()) < 5


def test_a_hold_stops_even_a_free_flow():
    async def waited():
        pace = Pace(None)
        await pace.take(1_000_000)
        start = time.monotonic()
        pace.hold(0.2)
        await pace.take(1)
        held = time.monotonic()
        await pace.take(1_000_000)
        return held - start, time.monotonic() - held

    held, after = asyncio.run(waited())
    assert held > 0.19 > after


def test_who_has_a_turn_already_is_held_too_and_keeps_its_distance():
    async def taken():
        pace, start = Pace(1200), time.monotonic()

        async def one():
            await pace.take(1)
            return time.monotonic() - start

        turns = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0.02)
        pace.hold(0.3)
        pace.hold(0.1)
        return await asyncio.gather(*turns), await one()

    turns, later = asyncio.run(taken())
    assert turns[0] < 0.3
    # Turns were at .05, .10, .15 and .20; a hold of .3 puts all of them off, and the next one.
    for number, turn in enumerate([*turns[1:], later]):
        assert turn > 0.34 + 0.05 * number


def test_a_purse_counts_what_may_be_billed_without_a_reply():
    async def tried():
        money, asked = purse(max_tokens=100)
        await money.hold(30, 10)
        once, twice = await money.lose(30, 10), await money.lose(30, 10)
        await money.settle((30, 10), (0, 0))
        too_much = await money.hold(21, 0)
        return once, twice, asked, await money.hold(20, 0), too_much

    once, twice, asked, fits, too_much = asyncio.run(tried())
    assert (once, twice, fits, too_much) == (True, False, True, False)
    assert (asked.lost_in, asked.lost_out, asked.tokens_in) == (60, 20, 0)


def test_a_purse_lets_go_out_only_what_still_fits():
    async def tried():
        money, asked = purse(max_tokens=100)
        first = await money.hold(40, 20)
        # 41 do not fit beside the 60 set aside; they wait, and fit once 50 were enough.
        second = asyncio.create_task(money.hold(30, 11))
        await asyncio.sleep(0.05)
        waited = not second.done()
        await money.settle((40, 20), (40, 10))
        fits = await second
        await money.settle((30, 11), (30, 11))
        return first, waited, fits, await money.hold(5, 5), asked

    first, waited, fits, last, asked = asyncio.run(tried())
    assert (first, waited, fits, last) == (True, True, True, False)
    assert (asked.tokens_in, asked.tokens_out) == (70, 21)
    assert asked.cost == (70 * 1.0 + 21 * 10.0) / 1e6


def test_a_purse_bounds_the_cost():
    async def tried():
        money, _ = purse(max_cost=0.001)
        return await money.hold(0, 101), await money.hold(0, 100)

    assert asyncio.run(tried()) == (False, True)


def test_an_estimate_learns_from_prompts_with_more_tokens_than_it_thought():
    estimate = Estimate()
    messages = ({"role": "user", "content": "x" * 300},)
    assert estimate.tokens(messages) == 108
    estimate.learn(messages, 308)
    assert estimate.tokens(messages) == 308
    estimate.learn(messages, 50)
    assert estimate.tokens(messages) == 308
