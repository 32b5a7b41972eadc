"""What all settings have in common: once read they can't be changed, and a key that they don't know is refused."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Settings that can't be changed once they are read, and that refuse a key they don't know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
