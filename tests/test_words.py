"""How refusals are worded: the key, what was given, what would do; and which names may become files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prestage.errors import InputError
from prestage.words import file_name, problems, shown, unknown_name


class Square(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["square"]
    width: int = Field(ge=1)


class Circle(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["circle"]
    radius: int


class Drawing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shapes: list[Annotated[Square | Circle, Field(discriminator="kind")]] = Field(min_length=1)
    width: int | Literal["full"] = 1
    by_name: dict[str, Circle] = {}
    copy_: int = Field(default=0, alias="copy")


SQUARE = {"kind": "square", "width": 1}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "shapes: missing; must be given"),
        ({"shapes": []}, "shapes: must have at least 1 item, not 0"),
        ({"shapes": [{"kind": "square"}]}, "shapes.0.width: missing; must be given"),
        ({"shapes": [{**SQUARE, "width": 0}]}, "shapes.0.width = 0: must be greater than or equal to 1"),
        ({"shapes": [{**SQUARE, "widht": 1}]}, "shapes.0.widht: no such key; did you mean 'width'?"),
        ({"shapes": [{**SQUARE, "zzz": 1}]}, "shapes.0.zzz: no such key; known keys: kind, width"),
        ({"shapes": [{"kind": "sqare"}]}, "shapes.0.kind = 'sqare': choose one of square, circle (did you mean 'squar"),
        ({"shapes": [{}]}, "shapes.0.kind: missing; choose one of square, circle"),
        ({"shapes": 3}, "shapes = 3: must be a list"),
        ({"shapes": [SQUARE], "width": "half"}, "width = 'half': must be a valid integer or must be 'full'"),
        ({"shapes": [SQUARE], "by_name": {"a": 3}}, "by_name.a = 3: must be a section, such as by_name.a.kind"),
        ({"shapes": [SQUARE], "by_name": {"a": {"kind": "circle"}}}, "by_name.a.radius: missing; must be given"),
        ({"shapes": [SQUARE], "copy": "x"}, "copy = 'x': must be a valid integer"),
        ({"shapes": [SQUARE], "copi": 1}, "copi: no such key; did you mean 'copy'?"),
        (3, "3: must be a table of keys, such as shapes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_the_keys_of_the_data(data: Any, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        Drawing.model_validate(data)
    assert problems(error.value, Drawing, data).startswith(said)


def test_many_problems_are_counted_and_long_values_cut() -> None:
    data: Any = {"shapes": [{"kind": "square", "width": -1}] * 1000}
    with pytest.raises(ValidationError) as error:
        Drawing.model_validate(data)
    said = problems(error.value, Drawing, data)
    assert said.startswith("shapes.0.width = -1: must be") and said.endswith("; and 992 more like these")
    data = {"shapes": [SQUARE], "widht": 1, **{f"k{number}": 1 for number in range(5000)}}
    with pytest.raises(ValidationError) as error:
        Drawing.model_validate(data)
    keys = "known keys: shapes, width, by_name, copy"
    told = "; ".join(f"k{number}: no such key; {keys}" for number in range(7))
    said = problems(error.value, Drawing, data)
    assert said == f"widht: no such key; did you mean 'width'?; {told}; and 4,993 more like these"
    assert len(shown("x" * 10_000)) < 200
    assert len(unknown_name("k", "x" * 10_000, ["a"])) < 200


@pytest.mark.parametrize("name", ["a", "budget", "größe 2", "k=5, 1 GB", "v1.2", "x" * 100, "-"])
def test_ordinary_names_become_files(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../../evil", "/etc/passwd", "a/b", "a\\b", "C:x", ".hidden", "a.", "a ", " a", "a\nb", "a\0b",
        "x" * 101, "nul", "COM1.txt", "a*",
    ],
)  # fmt: skip
def test_names_that_would_be_other_files_are_refused_with_their_key(name: str) -> None:
    with pytest.raises(InputError) as refused:
        file_name(name)
    assert str(refused.value).startswith(f"{shown(name)}: names a file: give 1 to 100 characters")
