"""Keys of serve.py."""

from typing import Annotated

from pydantic import Field

from megatron.config.schema.key_group import (
    Group,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    WholeNumber,
)


class ServingKeys(Group):
    """serve.py. The keys that clients need are in the environment variable DEEPY_API_KEYS, separated by commas."""

    serve_host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own (127.0.0.1, localhost, ::1) requires DEEPY_API_KEYS."""

    serve_port: Annotated[WholeNumber, Field(ge=0, lt=65536)] = 8000
    """Port to listen on; 0: a free one, which the log names."""

    serve_model_name: str | None = None
    """Name of the model in the API. Unset: that of the folder in load."""

    serve_context: Annotated[WholeNumber, Field(ge=2)] | None = None
    """Tokens of a text, prompt and answer together; memory holds keys and values of so many tokens for each of
    generation_batch_size texts. Unset: the model's context."""

    serve_max_tokens: PositiveInt | None = None
    """Most tokens of an answer that a request may ask for. Unset: what serve_context leaves."""

    serve_max_choices: PositiveInt = 16
    """Most answers of a request: its prompts times n."""

    serve_max_waiting: NotNegativeInt = 64
    """Texts that may wait for a slot; a request beyond is answered with 429."""

    serve_max_body: PositiveInt = 2**22
    """Most bytes of a request's body."""

    serve_request_timeout: PositiveFloat = 600.0
    """Seconds from the arrival of a request to the end of its answer; beyond, the answer is ended with an error."""

    serve_shutdown_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that answers may still take after SIGTERM; new requests get 503 meanwhile."""

    serve_log_prompts: bool = False
    """Write the prompts of requests to the log as well."""
