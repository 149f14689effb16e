"""What a device tells about itself, taken for what it is: text from elsewhere, of known shape and limited length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from edgeprune.errors import MeasurementError


def printable(text: str, keep: str = "\n\t") -> str:
    """Text from elsewhere without what would move a terminal's cursor or change its title, but for `keep`."""
    return "".join(char if char.isprintable() or char in keep else "?" for char in text.replace("\r\n", "\n"))


def _one_line(value: Any) -> Any:
    """The first 1000 characters of a text, printable and without line breaks; anything else as it is."""
    return printable(value[:1000], keep="") if isinstance(value, str) else value


_Text = Annotated[str, BeforeValidator(_one_line), StringConstraints(max_length=1000)]
_Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class Told(BaseModel):
    """The answer to `state`: `facts` that stay, `state` that varies, what slows it down now and has before."""

    facts: Annotated[dict[_Name, _Text | int], Field(max_length=50)] = {}
    state: Annotated[dict[_Name, _Number], Field(max_length=50)] = {}
    slowed: Annotated[list[_Text], Field(max_length=50)] = []
    slowed_before: Annotated[list[_Text], Field(max_length=50)] = []
    packages: Annotated[dict[_Name, _Text], Field(max_length=50)] = {}
    disk_free_mb: int = 0
    folder: _Text = ""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


def told(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as plain data; `MeasurementError` where it isn't of that shape."""
    try:
        return Told.model_validate(dict(answer)).model_dump()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(step)[:64] for step in fault["loc"])
        raise MeasurementError(
            f"the device program's answer to 'state' is malformed: {where}: {fault['msg']}"
        ) from None
