"""What is charged, what it costs and what is left: exact, known before, the same for whoever adds it up otherwise."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import pricing
from shared.pricing import Price, PriceSheet, Rates, Usage, charge, dollars, margin, nanos, read, shown

SHIPPED = Path(__file__).parents[2] / "deploy" / "prices.toml"

amounts = st.integers(0, 10**15)
counts = st.integers(0, 10**7)


def sheet(*lines: str, more: str = "") -> PriceSheet:
    return read(more + "".join(f"\n[[prices]]\n{line}\nsource = 'test'\ndate = 2026-11-27\n" for line in lines))


def test_two_dollars_a_million_at_1200_tokens_a_second_and_35_percent_pay_5_616_an_hour() -> None:
    price = sheet("input = 0\noutput = 2.00").price("any", "default")
    assert price is not None
    then, now = (pricing.revenue_per_hour(price, Rates(output=Fraction(rate))) for rate in (1200, 1500))
    hour = pricing.cost_for_margin(then, Fraction(35, 100))
    assert (shown(int(then), 2), shown(int(now), 2), shown(int(hour))) == ("8.64", "10.80", "5.616")
    assert hour == nanos("5.616") and margin(then, hour) == Fraction(35, 100)
    # the same machine, a quarter faster
    assert margin(now, hour) == Fraction(48, 100)
    assert (pricing.unit_cost(hour, Fraction(1200)), pricing.unit_cost(hour, Fraction(1500))) == (
        nanos("1.30"), nanos("1.04"))
    assert pricing.break_even(hour, price.output) == 780
    # and earns nothing any more at 65 and 52 % of its time
    for revenue, rate, share in ((then, 1200, 65), (now, 1500, 52)):
        used = pricing.revenue_per_hour(price, Rates(output=Fraction(rate)), Fraction(share, 100))
        assert margin(used, hour) == 0 and used == revenue * share / 100
    # what makes it faster may cost 1.404 an hour: then nothing was won
    assert margin(now, hour + nanos("1.404")) == Fraction(35, 100)


@given(price=amounts.filter(bool), rate=st.fractions(1, 10**5), hour=amounts, faster=st.fractions(Fraction(1, 10), 10))
def test_who_is_g_times_faster_keeps_1_minus_the_rest_over_g_whatever_the_price(
        price: int, rate: Fraction, hour: int, faster: Fraction) -> None:
    line = Price(0, 0, price)
    before, after = (margin(pricing.revenue_per_hour(line, Rates(output=r)), hour) for r in (rate, rate * faster))
    assert before is not None and after == 1 - (1 - before) / faster


def test_each_kind_of_token_has_its_price_and_batches_pay_half() -> None:
    prices = sheet("input = 1.00\ncached_input = 0.25\noutput = 3.00")
    usage = Usage(prompt_tokens=1000, cached_tokens=400, generated_tokens=50)
    whole, batch = prices.price("m", "default"), prices.price("m", "default", batch=True)
    assert whole is not None and batch is not None and batch.batch and not whole.batch
    assert shown(charge(whole, usage)) == "0.00085"  # 600 + 100 + 150 micro-dollars
    assert 2 * charge(batch, usage) == charge(whole, usage)


def test_a_token_that_costs_less_than_a_micro_dollar_is_not_lost() -> None:
    price = sheet("input = 0.05\ncached_input = 0.0125\noutput = 0.10").price("m", "flex")
    assert price is not None
    assert charge(price, Usage(2, 0, 0)) == 100 and charge(price, Usage(2, 2, 0)) == 25
    assert charge(price, Usage(0, 0, 3)) == 300


@given(prices=st.tuples(amounts, amounts, amounts), usage=st.tuples(counts, counts, counts), more=counts)
def test_more_tokens_never_cost_less_and_more_of_them_cached_never_more(
        prices: tuple[int, int, int], usage: tuple[int, int, int], more: int) -> None:
    cached_price, input_price, output_price = sorted(prices)[0], sorted(prices)[1], prices[2]
    price = Price(input_price, cached_price, output_price)
    prompt, cached, generated = usage[0], min(usage[:2]), usage[2]
    costs = charge(price, Usage(prompt, cached, generated))
    assert costs <= charge(price, Usage(prompt, cached, generated + more))
    assert costs <= charge(price, Usage(prompt + more, cached, generated))
    assert costs <= charge(price, Usage(prompt, 0, generated))
    exact = Fraction((prompt - cached) * input_price + cached * cached_price + generated * output_price, 10**6)
    assert costs == round(exact)
    assert costs < 2**63


def test_what_says_most_about_a_request_holds_first_its_model_then_its_tier_then_its_region() -> None:
    prices = sheet("input = 1\noutput = 1", "model = 'a'\ninput = 2\noutput = 2",
                   "tier = 'flex'\ninput = 3\noutput = 3",
                   "model = 'a'\ntier = 'flex'\ninput = 4\noutput = 4", "region = 'eu'\ninput = 5\noutput = 5",
                   "model = 'a'\nregion = 'eu'\ninput = 6\noutput = 6",
                   "model = 'a'\nregion = 'eu-north1'\ninput = 7\noutput = 7")

    def costs(*asked: object) -> str:
        price = prices.price(*asked)  # type: ignore[arg-type]
        assert price is not None
        return shown(price.output)

    assert [costs("b", "default"), costs("a", "default"), costs("b", "flex"), costs("a", "flex")] == list("1234")
    assert [costs("b", "default", ("eu-west1",)), costs("a", "priority", ("eu",)),
            costs("a", "default", ("eu-north1-a",)), costs("a", "default", ("europe",))] == list("5672")
    assert costs("a", "flex", ("eu-north1",)) == "4"  # its tier says more than its region
    assert costs("a", "default", ("us", "eu")) == "6"  # the dearer of both


def test_of_several_zones_the_dearest_holds_for_each_kind_of_token() -> None:
    prices = sheet("region = 'eu'\ninput = 1\noutput = 9", "region = 'us'\ninput = 2\ncached_input = 0.5\noutput = 8")
    both = prices.price("m", "default", ("eu", "us"))
    assert both is not None
    assert [shown(both.input), shown(both.cached_input), shown(both.output), both.region] == ["2", "1", "9", "eu,us"]
    assert prices.price("m", "default", ("eu", "asia")) is None and prices.price("m", "default") is None
    assert prices.unpriced(["m"], ("asia",)) == [("m", "priority"), ("m", "default"), ("m", "flex")]
    assert prices.unpriced(["m"], ("eu",)) == []


def test_an_hour_costs_what_the_worker_says_else_what_its_sku_does() -> None:
    prices = sheet("input = 1\noutput = 1", more="[skus.h100]\nusd_per_hour = 2.95\nsource = 's'\ndate = 2026-05-18\n")
    assert prices.hour("h100") == nanos("2.95") and prices.hour("h100", 0.1) == nanos("0.1")
    assert prices.hour("h100", 1 / 3) == 333_333_333  # a worker says what it likes
    assert prices.hour("h100", 1e300) == prices.hour("h100", float("inf")) == nanos("2.95")
    assert prices.hour("a6000") is None and prices.hour("h100", float("nan")) == nanos("2.95")
    assert prices.skus["h100"].source == "s, 2026-05-18"
    # 0.25 s of 3.60 an hour
    assert pricing.worker_cost(nanos("3.60"), 250_000) == nanos("0.00025")
    assert margin(0, 5) is None and margin(nanos("0.001"), nanos("0.00025")) == Fraction(3, 4)
    assert margin(4, 5) == Fraction(-1, 4)


@pytest.mark.parametrize(("text", "reason"), [
    ("[[prices]]\ninput = 1", "prices[0]: Object missing required field `output`"),
    ("prices = []", "it has none"),
    ("[[prices", "it is no TOML"),
    ("[[prices]]\ninput = 1\noutput = 1\nsource = ''\ndate = 1\nouput = 2", "unknown field `ouput`"),
    ("[[prices]]\ninput = -1\noutput = 1\nsource = ''\ndate = 1", "prices[0].input: -1 is no amount of dollars"),
    ("[[prices]]\ninput = 1\noutput = inf\nsource = ''\ndate = 1", "prices[0].output"),
    ("[[prices]]\ninput = 1\noutput = 1e300\nsource = ''\ndate = 1", "prices[0].output"),
    ("[[prices]]\ninput = 1\noutput = 1000001\nsource = ''\ndate = 1", "is more than 1000000"),
    ("[[prices]]\ninput = 1\noutput = 0.0000000001\nsource = ''\ndate = 1", "at most 9 digits behind the point"),
    ("[[prices]]\ninput = true\noutput = 1\nsource = ''\ndate = 1", "True is no amount"),
    ("[[prices]]\ninput = 1\ncached_input = 2\noutput = 1\nsource = ''\ndate = 1", "cannot cost more than one that"),
    ("[[prices]]\ntier = 'fast'\ninput = 1\noutput = 1\nsource = ''\ndate = 1", "'fast' is no tier"),
    ("[[prices]]\nregion = 'e u'\ninput = 1\noutput = 1\nsource = ''\ndate = 1", "'e u' is no zone"),
    (2 * "[[prices]]\ninput = 1\noutput = 1\nsource = ''\ndate = 1\n", "two prices are for model '*'"),
    ("batch = 2\n[[prices]]\ninput = 1\noutput = 1\nsource = ''\ndate = 1", "batches cannot pay more"),
])
def test_a_sheet_with_a_mistake_is_refused_by_a_sentence_that_says_where(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(text)
    assert reason in str(caught.value)


@given(st.integers(-10**18, 10**18))
def test_amounts_are_shown_exactly_and_read_back(amount: int) -> None:
    assert dollars(amount) * 10**9 == amount
    if amount >= 0:
        assert nanos(shown(amount)) == amount


@pytest.mark.parametrize(("said", "amount"), [
    ("2.00", 2 * 10**9), (0.1, 10**8), (Decimal("0.096"), 96 * 10**6), (3, 3 * 10**9), ("0", 0)])
def test_an_amount_is_what_is_written_also_where_it_was_a_float(said: str | float | Decimal, amount: int) -> None:
    assert nanos(said) == amount


@pytest.mark.parametrize("said", ["", "x", "nan", "inf", "-1", "1e30", "0.0000000001", float("nan"), None])
def test_what_is_no_amount_is_refused(said: object) -> None:
    with pytest.raises(ValueError, match="no amount of dollars"):
        nanos(said)  # type: ignore[arg-type]


def test_the_shipped_sheet_prices_every_model_at_every_tier_and_says_where_each_figure_is_from() -> None:
    prices = read(SHIPPED.read_text())
    assert prices.unpriced(["anything"]) == [] and prices.unpriced(["anything"], ("eu-north1", "us")) == []
    assert set(prices.skus) >= {"cpu", "h100", "h200"} and all(sku.source for sku in prices.skus.values())
    assert prices.batch == Fraction(1, 2)


@pytest.mark.parametrize(("millionths", "charged"), [(499_999, 0), (500_000, 0), (500_001, 1), (1_500_000, 2),
                                                     (2_500_000, 2), (2_500_001, 3)])
def test_half_a_nano_dollar_goes_to_the_even_side(millionths: int, charged: int) -> None:
    assert charge(Price(0, 0, millionths), Usage(generated_tokens=1)) == charged
