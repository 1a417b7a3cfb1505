"""What the sections of a recipe are made of: a strict section, numbers with their ranges, and places."""

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue


def _nameable(value: float) -> float:
    text = f"{value:g}"
    if "e" in text or float(text) != value:
        raise ValueError("is part of a column's name: at most six digits and no exponent")
    return value


def _at_home(value: str) -> str:
    place = os.path.expanduser(value)  # noqa: PTH111 - a Path would take a slash out of a URL
    if place.startswith("~"):
        raise ValueError(f"there is no user {place.partition('/')[0].removeprefix('~')!r} on this machine")
    return place


Positive = Annotated[float, Field(gt=0)]
# A number that stands in a column's name, where it must say exactly what it is.
Nameable = Annotated[float, Field(gt=0), AfterValidator(_nameable)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
BlockIndex = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
WarmupFraction = Annotated[float, Field(ge=0, lt=1)]


# A place on this machine; `~` is somebody's home, which a shell leaves as it is behind a `=`. A URL stays as it is.
Place = Annotated[str, AfterValidator(_at_home)]


_LATER: dict[str, JsonValue] = {"came_later": True}


def later(default: Any) -> Any:
    """Declare a key that recipes had not when roots and outputs that are in use were made; see `Section.identity`."""
    return Field(default=default, json_schema_extra=_LATER)


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no conversions, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """Return what the section says, as roots and outputs know it by: JSON-able.

        They outlive versions: a key that came `later` is left out where it is as it was before there was one.
        """
        said = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value, extra = getattr(self, name), field.json_schema_extra
            if isinstance(value, Section):
                said[name] = value.identity()
            elif isinstance(value, list) and value and all(isinstance(item, Section) for item in value):
                said[name] = [item.identity() for item in value]
            elif extra == _LATER and value == field.default:
                del said[name]
        return said
