"""The links between the GPUs of a run, as its scenario wants them."""

from __future__ import annotations

from ...resources.links import Links, LinkSetting
from ...resources.topology import TopologyError
from ..scenario.amounts import ScenarioError
from ..scenario.inputs import Inputs


def links_of(inputs: Inputs, gpus: int, key: str) -> Links:
    """Returns the links between so many GPUs; ScenarioError naming the `key` that asks for them if there are fewer."""
    scenario = inputs.scenario
    setting = LinkSetting(
        free=scenario.dispatch.mode == "free",
        contention=scenario.copy_.contention,
        moves=scenario.parallel.gpus > 1,
    )
    try:
        return Links(inputs.profile, gpus, setting)
    except TopologyError as error:
        raise ScenarioError(f"{key} = {gpus}: {error}") from None
