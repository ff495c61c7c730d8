"""`prestage model`: shipped models, and those of a user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_json, say_replaced
from .options import Json

if TYPE_CHECKING:
    from ..workloads.model import Model

app = typer.Typer(
    help="""List, show, import and check models.

    A model is a shipped name, a TOML file, a Hugging Face config.json or its folder, or a GGUF file; a scenario names
    it as model.preset.
    """
)
_Name = Annotated[str, typer.Argument(help="A shipped name, FILE.toml, config.json, its folder, or FILE.gguf.")]
_Dtype = Annotated[str | None, typer.Option(help="The dtype of the routed experts, such as q4_k or nvfp4.")]
_Bits = Annotated[float | None, typer.Option(help="Bits per weight of all matrices, where nothing else is known.")]
#: How far a model's bytes may be from its checkpoint's.
_AGREES = 0.005


@app.command("list")
def model_list(json: Json = False) -> None:
    """List the shipped models, and the families of which a config.json is read.

    \b
    Examples:
      prestage model list --json
    """
    from ..workloads.model_files.describe import shipped
    from ..workloads.model_files.hf_config import known_types

    models, families = shipped(), known_types()
    if json:
        print_json({"models": models, "families": families})
        return
    from ..output.models import print_models

    print_models(models, families)


@app.command("show")
def model_show(model: _Name, dtype: _Dtype = None, bits_per_weight: _Bits = None, json: Json = False) -> None:
    """Show what a model holds and moves.

    \b
    Examples:
      prestage model show gpt-oss-120b
      prestage model show config.json --bits-per-weight 4.85
    """
    from ..workloads.model import load_model
    from ..workloads.model_files.describe import described

    data = described(load_model(model, dtype=dtype, bits_per_weight=bits_per_weight))
    if json:
        print_json(data)
        return
    from ..output.models import print_model

    print_model(data)


@app.command("import")
def model_import(
    config: Annotated[Path, typer.Argument(help="A Hugging Face config.json, or its folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The TOML file to write.")],
    name: Annotated[str | None, typer.Option(help="The model's name; without it, the folder's.")] = None,
) -> None:
    """Turn a config.json into a TOML file, to be changed by hand.

    \b
    Examples:
      prestage model import config.json -o olmoe.toml --name olmoe
    """
    from ..errors import InputError
    from ..files import check_file, write_file
    from ..workloads.model_files.sources import read_shapes
    from ..workloads.model_files.toml_text import toml_of

    if out.suffix != ".toml":
        raise InputError(f"--out {out}: must end with .toml, as a model's file does")
    if config.suffix == ".gguf":
        raise InputError(
            f"{config}: a GGUF file is used as it is (model.preset = '{config}'): its tensors have no shapes"
        )
    check_file(out)
    shapes = read_shapes(str(config))
    if name is not None:
        shapes = shapes.model_copy(update={"name": name})
    if out.exists():
        say_replaced(out, "model")
    write_file(out, toml_of(shapes).encode())
    typer.echo(f"{out}: {shapes.name}, {shapes.moe_layers} MoE layers")


@app.command("check")
def model_check(model: _Name, json: Json = False) -> None:
    """Check a model: that it can be read and, in a folder with safetensors or their index, that its bytes agree.

    Exit status 2 if they differ by more than 0.5 %. Only the files' headers are read.

    \b
    Examples:
      prestage model check config.json
    """
    from ..errors import InputError
    from ..workloads.model import load_model
    from ..workloads.model_files.checkpoint import checkpoint_of, weight_bytes

    found = load_model(model)
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    if not Path(model).exists() or not _has_checkpoint(folder):
        _say(found, {"model_bytes": weight_bytes(found), "checkpoint_bytes": None, "difference": None}, json)
        return
    checkpoint = checkpoint_of(folder)
    difference = weight_bytes(found) / checkpoint.model_bytes - 1
    data = {
        "model_bytes": weight_bytes(found),
        "checkpoint_bytes": checkpoint.model_bytes,
        "other_bytes": checkpoint.other_bytes,
        "difference": difference,
        "read": checkpoint.read,
    }
    _say(found, data, json)
    if abs(difference) > _AGREES:
        hint = "; the index also counts draft layers and other parts" if checkpoint.other_bytes is None else ""
        raise InputError(f"{model}: {difference:+.2%} from {checkpoint.read}: more than {_AGREES:.1%}{hint}")


def _has_checkpoint(folder: Path) -> bool:
    from ..workloads.model_files.checkpoint import INDEX

    return (folder / INDEX).is_file() or any(folder.glob("model*.safetensors"))


def _say(model: Model, data: Mapping[str, object], json: bool) -> None:
    if json:
        print_json({"name": model.name, **data})
        return
    typer.echo(f"{model.name}: {model.layers} MoE layers of {model.experts} experts, {data['model_bytes']:,} bytes")
    if data["difference"] is None:
        typer.echo("no safetensors beside it to check by")
    else:
        typer.echo(f"{data['checkpoint_bytes']:,} bytes by {data['read']}: {data['difference']:+.3%}")
