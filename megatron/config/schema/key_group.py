"""What every group of configuration keys has in common: strict, frozen, documented.

A group is a frozen pydantic model; a field is one key of the flat YAML, and the docstring under it is the reference
manual's entry. Values that a registry names are checked against the registry, never against a second list.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron import registry


class Group(BaseModel):
    """Base of all groups: no unknown keys, no silent conversions, no changes after it is built."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def registered(kind: str) -> AfterValidator:
    """A validator that accepts the names of a registry kind, plugins included."""

    def check(name: str) -> str:
        if name not in registry.names(kind):
            raise ValueError(registry.unknown_name(kind, name))
        return name

    return AfterValidator(check)


def _whole(value: object) -> object:
    # 5e8 is how sizes of buckets are written, and YAML reads it as a float.
    return int(value) if isinstance(value, float) and value.is_integer() else value


PositiveInt = Annotated[int, Field(gt=0)]
NotNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Elements = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
