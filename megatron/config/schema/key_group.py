"""Base class and field types of all groups of configuration keys: strict, frozen, documented.

A group is a frozen pydantic model; a field is one key of the flat YAML, and the docstring under it is its entry in the
reference manual. Names that a registry defines are checked against the registry, never against a second list.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from megatron import registry
from megatron.errors import UserError
from megatron.files import expanded

LARGEST = 2**63 - 1  # of a whole number, which tensors and files hold in 64 bits
NO_VALUE = ("none", "null")  # text in lower case that other programs write for an unset key
PATH_PROBLEM = "path_problem"  # type of the error of a path, whose message is complete


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
    """The value, 1e3 and 5e8 as whole numbers, which YAML reads as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{value:.3g} is too large; whole numbers go up to 2^63 - 1")
    return value


def expanded_path(path: str, info: ValidationInfo) -> str:
    """The path with `~` and `$VARIABLE` replaced."""
    if path.lower() in NO_VALUE:
        reason = f'{info.field_name} ("{path}") would be a file of that name; leave the key out, or write "./{path}"'
        raise PydanticCustomError(PATH_PROBLEM, "{reason}", {"reason": reason})
    try:
        return expanded(path, str(info.field_name))
    except UserError as error:
        raise PydanticCustomError(PATH_PROBLEM, "{reason}", {"reason": str(error)}) from error


PathText = Annotated[str, AfterValidator(expanded_path)]
WholeNumber = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[WholeNumber, Field(gt=0)]
NotNegativeInt = Annotated[WholeNumber, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
