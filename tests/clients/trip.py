"""What scenarios ask of a model: an object of a class, or a call with its fields."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Trip(BaseModel, extra="forbid"):
    """A trip to a city."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=99)
    by_train: bool


TOOL = {
    "type": "function",
    "function": {"name": "Trip", "description": "A trip to a city.", "parameters": Trip.model_json_schema()},
}
