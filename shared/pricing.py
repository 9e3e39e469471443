"""What tokens cost: the price sheet, what a request is charged, what it costs us, and what is left of that.

Rules: money is whole nano-dollars, for a token may cost less than a micro-dollar; a price is nano-dollars for a million
tokens or for an hour; what has to be divided is divided once, at the end of a sum, half to even; rates and shares are
fractions, and no float comes in: what is one on the wire is taken as it is written (0.1 is a tenth). A price is known
before a request starts: it follows from the model, the tier and the zones that the request is held in, never from where
it lands. Nothing costs more when more of it was cached, so what a request may come to is known before, too.
Pure: reads text, not files.

    read(text) -> PriceSheet    PriceSheet.price(model, tier, zones) -> Price    charge(price, usage) -> nano-dollars
"""

import tomllib
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
from msgspec import Struct

from shared.residency import check_zone
from shared.tiers import TIERS

NANOS = 10**9  # in a dollar
MILLION = 10**6
HOUR_S = 3600
ANY = "*"
MOST_FOUND = 4096  # answers that are remembered
MOST_USD = 10**6  # for a million tokens, or an hour: sums of it stay within the 63 bits of a database


class Price(Struct, frozen=True):
    """Of tokens, in nano-dollars a million. `model`, `tier` and `region`: what it is for, `*` for all."""

    input: int
    cached_input: int
    output: int
    model: str = ANY
    tier: str = ANY
    region: str = ANY
    batch: bool = False  # what it has been cut to


class Sku(Struct, frozen=True):
    """What an hour of a worker costs us, in nano-dollars; `source` says who says so, and when."""

    name: str
    hour: int
    source: str = ""


class Usage(Struct, frozen=True):
    """Tokens of one request. `cached_tokens` are among `prompt_tokens`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Rates(Struct, frozen=True):
    """Tokens a second that somebody pays for. `input` without those that were cached."""

    input: Fraction = Fraction(0)
    cached_input: Fraction = Fraction(0)
    output: Fraction = Fraction(0)


class PriceSheet:
    """All prices. Of those that fit a request that one holds which says most of it: model before tier before region."""

    def __init__(self, prices: Iterable[Price], skus: Iterable[Sku] = (), batch: Fraction = Fraction(1, 2)) -> None:
        """`batch`: what share of a price batches pay. Raises ValueError for two prices of the same thing."""
        self.prices = tuple(prices)
        self.skus = {sku.name: sku for sku in skus}
        self.batch = batch
        self._found: dict[tuple[str, str, tuple[str, ...], bool], Price | None] = {}
        self._by: dict[tuple[str, str], dict[str, Price]] = {}
        for price in self.prices:
            of = self._by.setdefault((price.model, price.tier), {})
            if price.region in of:
                raise ValueError(f"two prices are for model {price.model!r}, tier {price.tier!r}, region "
                                 f"{price.region!r}: take one out")
            of[price.region] = price

    def price(self, model: str, tier: str, zones: Sequence[str] = (), batch: bool = False) -> Price | None:
        """What `model` costs at `tier` for who is held in `zones` (none: may go anywhere); None: it has no price.

        Several zones: the dearest of theirs, each kind of token for itself: nowhere it costs more than was said.
        """
        asked = (model, tier, tuple(zones), batch)
        if asked not in self._found:
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            self._found[asked] = self._price(*asked)
        return self._found[asked]

    def _price(self, model: str, tier: str, zones: tuple[str, ...], batch: bool) -> Price | None:
        found = [price for zone in (zones or (ANY,)) if (price := self._held_in(model, tier, zone)) is not None]
        if not found or len(found) < len(zones):
            return None
        share = self.batch if batch else Fraction(1)
        input, cached, output = (
            round(share * max(getattr(price, kind) for price in found)) for kind in ("input", "cached_input", "output"))
        return Price(input, cached, output, found[0].model, found[0].tier,
                     found[0].region if len(found) == 1 else ",".join(price.region for price in found), batch)

    def unpriced(self, models: Iterable[str], zones: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Models and tiers that have no price."""
        return [(model, tier) for model in models for tier in TIERS if self.price(model, tier, zones) is None]

    def hour(self, sku: str, said_usd: float = 0.0) -> int | None:
        """What an hour of a worker costs us: as it says itself, else as the sheet says of its SKU; None: unknown."""
        if 0.0 < said_usd <= MOST_USD:
            return round(Decimal(repr(said_usd)) * NANOS)
        return self.skus[sku].hour if sku in self.skus else None

    def _held_in(self, model: str, tier: str, zone: str) -> Price | None:
        for of in ((model, tier), (model, ANY), (ANY, tier), (ANY, ANY)):
            for region in _regions(zone):
                if (price := self._by.get(of, {}).get(region)) is not None:
                    return price
        return None


# --- one request -----------------------------------------------------------------------------------------------------


def charge(price: Price, usage: Usage) -> int:
    """Nano-dollars that `usage` comes to."""
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    millionths = ((usage.prompt_tokens - cached) * price.input + cached * price.cached_input
                  + usage.generated_tokens * price.output)
    # as round(Fraction(millionths, MILLION)), in a tenth of its time
    whole, rest = divmod(millionths, MILLION)
    return whole + (2 * rest > MILLION or (2 * rest == MILLION and whole % 2))


def worker_cost(hour: int, worker_us: int) -> int:
    """Nano-dollars that so many microseconds of a worker cost us, at `hour` nano-dollars an hour."""
    return round(Fraction(hour * worker_us, HOUR_S * MILLION))


def margin(revenue: int | Fraction, cost: int | Fraction) -> Fraction | None:
    """The share of revenue that is left; below 0 where it does not pay; None without revenue."""
    return None if not revenue else 1 - Fraction(cost) / Fraction(revenue)


# --- an hour ---------------------------------------------------------------------------------------------------------


def revenue_per_hour(price: Price, rates: Rates, utilisation: Fraction = Fraction(1)) -> Fraction:
    """Nano-dollars that a worker earns in an hour of these rates, of which it serves `utilisation`."""
    each_s = rates.input * price.input + rates.cached_input * price.cached_input + rates.output * price.output
    return each_s * HOUR_S * utilisation / MILLION


def cost_for_margin(revenue: int | Fraction, wanted: Fraction) -> Fraction:
    """What may be spent of `revenue` so that this margin is left."""
    return Fraction(revenue) * (1 - wanted)


def unit_cost(hour: int | Fraction, tokens_per_s: Fraction) -> Fraction:
    """Nano-dollars that a million tokens cost us at this rate."""
    return Fraction(hour) * MILLION / (tokens_per_s * HOUR_S)


def break_even(hour: int | Fraction, price_per_million: int) -> Fraction:
    """Tokens a second from which on `hour` is earned."""
    return Fraction(hour) * MILLION / (price_per_million * HOUR_S)


# --- money as people write it ----------------------------------------------------------------------------------------


def nanos(usd: str | int | float | Decimal) -> int:
    """Nano-dollars of an amount in dollars. Raises ValueError for what is none, is negative or has a finer part."""
    try:
        amount = Decimal(repr(usd) if isinstance(usd, float) else usd)
        whole = amount * NANOS
        if not amount.is_finite() or amount < 0 or amount > MOST_USD * MILLION:
            raise ValueError
        if whole != (found := int(whole)):
            raise ValueError
    except (ValueError, ArithmeticError, TypeError):
        raise ValueError(f"{usd} is no amount of dollars: write such as 2.00, with at most 9 digits behind the "
                         "point") from None
    return found


def dollars(amount: int) -> Decimal:
    """The amount in dollars, exact; zeros at its end left out."""
    return Decimal(shown(amount))


def shown(amount: int, places: int = 0) -> str:
    """`0.000123`: an amount in dollars as people read it, exact, with at least so many places."""
    whole, rest = divmod(abs(amount), NANOS)
    behind = f"{rest:09}".rstrip("0").ljust(places, "0")
    return f"{'-' if amount < 0 else ''}{whole}{f'.{behind}' if behind else ''}"


# --- the sheet as people write it ------------------------------------------------------------------------------------


class _Line(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str = ANY
    tier: str = ANY
    region: str = ANY
    input: Any
    cached_input: Any = None
    output: Any
    source: str
    date: Any


class _Sku(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    usd_per_hour: Any
    source: str
    date: Any


class _File(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    batch: Any = Decimal("0.5")
    prices: list[_Line]
    skus: dict[str, _Sku] = {}


def read(text: str) -> PriceSheet:
    """The sheet of a file's text. Raises ValueError saying what is wrong where."""
    try:
        found = msgspec.convert(tomllib.loads(text, parse_float=Decimal), _File)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        raise ValueError(f"{path.rstrip('`')}: {what}" if path else what) from None
    if not found.prices:
        raise ValueError("prices: it has none")
    batch = Fraction(_amount("batch", found.batch), NANOS)
    if batch > 1:
        raise ValueError("batch: batches cannot pay more than the price: write 0.5 for half of it")
    return PriceSheet([_price(f"prices[{number}]", line) for number, line in enumerate(found.prices)],
                      [Sku(name, _amount(f"skus.{name}.usd_per_hour", sku.usd_per_hour), f"{sku.source}, {sku.date}")
                       for name, sku in found.skus.items()], batch)


def _price(where: str, line: _Line) -> Price:
    if line.tier not in (ANY, *TIERS):
        raise ValueError(f"{where}.tier: {line.tier!r} is no tier: write {', '.join(TIERS)} or {ANY}")
    input, output = _amount(f"{where}.input", line.input), _amount(f"{where}.output", line.output)
    try:
        region = line.region if line.region == ANY else check_zone(line.region)
    except ValueError as error:
        raise ValueError(f"{where}.region: {error}") from None
    cached = input if line.cached_input is None else _amount(f"{where}.cached_input", line.cached_input)
    if cached > input:
        raise ValueError(f"{where}.cached_input: a token that was cached cannot cost more than one that was not")
    return Price(input, cached, output, line.model, line.tier, region)


def _amount(where: str, said: Any) -> int:
    if isinstance(said, bool) or not isinstance(said, int | Decimal | str):
        raise ValueError(f"{where}: {said!r} is no amount: write a number such as 2.00")
    try:
        amount = nanos(said)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if amount > MOST_USD * NANOS:
        raise ValueError(f"{where}: {said} is more than {MOST_USD}")
    return amount


def _regions(zone: str) -> list[str]:
    """The zone, what it lies in, and everywhere: `eu-north1`, `eu`, `*`."""
    if zone == ANY:
        return [ANY]
    parts = zone.split("-")
    return [*("-".join(parts[:n]) for n in range(len(parts), 0, -1)), ANY]
