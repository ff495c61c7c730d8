"""A model, and a machine by its parts, named on the command line: turned into settings of a scenario."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

#: The GPU of whoever asks for the machine that the command runs on.
DETECT = "detect"
#: What a run begins with that names a model or a machine and no scenario.
BASE = "one-gpu"

Model = Annotated[
    str | None, typer.Option(help="The model, as model.preset takes it: gpt-oss-120b …", show_default=False)
]
Gpu = Annotated[
    str | None,
    typer.Option(help="The GPU: rtx4090, '2x rtx3090', none; detect is all of this machine. See `machine list`."),
]
Cpu = Annotated[str | None, typer.Option(help="Its processor, such as 7950x or '2x xeon-8480+'.")]
Ram = Annotated[str | None, typer.Option(help="Its memory, such as '64GB DDR5-5600' or '2x DDR5-5600'.")]
Link = Annotated[str | None, typer.Option(help="The link to each GPU, such as 'pcie4 x8' or 25.2GB/s.")]
Drive = Annotated[str | None, typer.Option(help="Its drive, such as '2TB 7GB/s' or samsung-990-pro.")]
Runtime = Annotated[
    str | None, typer.Option(help="The software to predict, as runtime.name takes it: llama.cpp …", show_default=False)
]
Context = Annotated[
    int | None, typer.Option(min=0, help="Positions in the KV cache before a sequence begins, as workload.context.")
]
#: By their fields: the options that a command takes in place of its parameter `own`.
_OPTIONS: dict[str, Any] = {
    "model": Model, "gpu": Gpu, "cpu": Cpu, "ram": Ram, "link": Link, "drive": Drive, "context": Context,
    "runtime": Runtime,
}  # fmt: skip


@dataclass(frozen=True)
class Own:
    """What the options of a command say of a model and of a machine's parts."""

    model: str | None = None
    gpu: str | None = None
    cpu: str | None = None
    ram: str | None = None
    link: str | None = None
    drive: str | None = None
    context: int | None = None
    runtime: str | None = None

    def parts(self) -> dict[str, str]:
        """Returns the parts that are given, by their keys; of this machine, those that it tells and nobody gives."""
        named = {"gpu": self.gpu, "link": self.link, "cpu": self.cpu, "ram": self.ram, "drive": self.drive}
        given = {key: value for key, value in named.items() if value is not None}
        if self.gpu != DETECT:
            return given
        from ..resources.parts.detect import detect

        del given["gpu"]
        return {"gpu": "none", **detect().parts, **given}

    def given(self, name: str | None, settings: list[str] | None) -> tuple[str | None, list[str]]:
        """Returns the scenario to begin with and all settings, of a command's scenario and its `--set`."""
        return self.scenario(name), [*self.settings(name), *(settings or ())]

    def scenario(self, name: str | None) -> str | None:
        """Returns the scenario to begin with: the one named, or the one for whoever names a model or a machine."""
        return BASE if self._begins_anew(name) else name

    def _begins_anew(self, name: str | None) -> bool:
        """Whether no scenario is named: a model's name beside a machine is the model, also if a scenario has it."""
        from ..workloads.model import names_model

        if name is None:
            return self.model is not None or bool(self.parts())
        return names_model(name) and bool(self.parts())

    def settings(self, name: str | None) -> list[str]:
        """Returns the settings of a scenario that say the same; `name` is the scenario that was named, if one was.

        A GPU begins a machine anew.
        """
        from ..resources.parts.written import joined_parts
        from ..workloads.fitted import shipped_fits

        anew = self._begins_anew(name)
        model = self.model if self.model is not None or not anew else name
        settings = [] if model is None else [_setting("model.preset", model)]
        settings += [f"workload.synthetic.fit={model}"] if anew and model in shipped_fits() else []
        settings += [] if self.runtime is None else [f"runtime.name={self.runtime}"]
        settings += [] if self.context is None else [f"workload.context={self.context}"]
        parts = self.parts()
        if self.gpu is None:
            return settings + [_setting(f"machine.{key}", value) for key, value in parts.items()]
        return [*settings, _setting("machine.profile", joined_parts(parts))]


#: None of these options given.
NOTHING = Own()


def takes_own(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose parameter `own` is given by an option for each of its fields."""

    @functools.wraps(command)
    def with_options(*args: Any, **given: Any) -> None:
        command(*args, own=Own(**{name: given.pop(name) for name in _OPTIONS}), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name == "own":
            parameters += [
                parameter.replace(name=name, annotation=kind, default=None) for name, kind in _OPTIONS.items()
            ]
        else:
            parameters.append(parameter)
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _setting(key: str, value: str) -> str:
    return f"{key}={json.dumps(value)}"
