"""What a run under load costs: energy and money for a million tokens, where the scenario says watts and price."""

from __future__ import annotations

from ...workloads.requests.log import RequestLog
from ..scenario.sections_requests import CostSection

_MILLION, _SECONDS = 1e6, 3600.0


def request_costs(section: CostSection, log: RequestLog, run_ms: float, busy_ms: float) -> dict[str, float | None]:
    """Returns energy and price of a run and of a million of its output tokens; None of what nobody says.

    The run lasts `run_ms`, from its first instant to its last, and its compute stream is busy for `busy_ms` of it.
    """
    tokens = len(log.token_times()[0])
    energy_kwh = price = None
    if section.watts is not None:
        idle_watts = section.watts if section.idle_watts is None else section.idle_watts
        energy_kwh = (section.watts * busy_ms + idle_watts * (run_ms - busy_ms)) / 1e6 / _SECONDS
    if section.price_per_hour is not None:
        price = section.price_per_hour * run_ms / 1e3 / _SECONDS
    return {
        "energy_kwh": energy_kwh,
        "price": price,
        "energy_kwh_per_million_tokens": _each(energy_kwh, tokens),
        "price_per_million_tokens": _each(price, tokens),
    }


def _each(whole: float | None, tokens: int) -> float | None:
    return None if whole is None or not tokens else whole / tokens * _MILLION
