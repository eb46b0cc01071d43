"""Keys of generation: how a prompt is continued, and where prompts come from and texts go."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from megatron.config.schema.key_group import (
    Fraction,
    Group,
    NotNegativeFloat,
    NotNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    expanded_path,
)


def _several(value: object) -> object:
    """A text alone as a list of one."""
    return (value,) if isinstance(value, str) else value


def _numbered(value: object) -> object:
    """A group with its keys, which are text in YAML and JSON, as whole numbers where they are some."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: part for key, part in value.items()}


def _schema(value: str, info: ValidationInfo) -> str:
    """A schema as it is, or the path of its file."""
    return value if value.lstrip().startswith("{") else expanded_path(value, info)


Quantization = Literal["int8"]
NotEmpty = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class AnswerKeys(Group):
    """How a prompt is continued. A line of a JSON Lines file may set each of these keys for its prompt."""

    maximum_tokens: PositiveInt = 64
    """Maximum number of generated tokens."""

    minimum_tokens: NotNegativeInt = 0
    """Tokens before which neither the end of the document nor a stop token is generated."""

    num_samples: PositiveInt = 1
    """Texts per prompt, or in total when unconditional."""

    temperature: NotNegativeFloat = 0.0
    """Sampling temperature. With temperature, top_k, top_p and min_p all 0: greedy decoding."""

    top_k: NotNegativeInt = 0
    """Number of most likely tokens to sample from; 0: no limit."""

    top_p: Fraction = 0.0
    """Sample from the most likely tokens whose probabilities add up to this; 0: no limit."""

    min_p: Fraction = 0.0
    """Sample from tokens that have this share of the most likely token's probability; 0: no limit."""

    repetition_penalty: PositiveFloat = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt or the text has; 1: none."""

    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the text has, without the prompt; -2 to 2."""

    frequency_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens once for each time that the text has them, without the prompt; -2 to 2."""

    logit_bias: Annotated[dict[NotNegativeInt, Bias], BeforeValidator(_numbered)] | None = None
    """Added to the logits of tokens, by id: {50256: -100}; -100 to 100. Unset: nothing."""

    stop: Annotated[tuple[NotEmpty, ...], BeforeValidator(_several)] = ()
    """Text, or a list of texts, before which a generated text ends."""

    stop_token_ids: tuple[NotNegativeInt, ...] = ()
    """Ids of tokens before which a generated text ends, as before the end of a document."""

    ignore_end_of_document: bool = False
    """Continue after the end of a document."""

    num_beams: PositiveInt = 1
    """Beams of a beam search; 1: none."""

    length_penalty: float = 1.0
    """Beam search: the score of a text is its log-likelihood divided by its tokens to the power of this."""

    early_stopping: bool = False
    """Beam search: end as soon as num_beams texts are finished, instead of when no better one can be found."""

    json_schema: Annotated[str, AfterValidator(_schema)] | None = None
    """The text must be JSON that satisfies this schema: "{...}", or a file with one. Unset: any text."""

    regex: NotEmpty | None = None
    """Regular expression that the whole text must match. Unset: any text."""

    logprobs: NotNegativeInt | None = None
    """Also write the log-probability of each generated token, and those of this many most likely ones. Unset: none."""

    return_logits: bool = False
    """Also write the logits of every generated token."""


class GenerationKeys(AnswerKeys):
    """generate.py."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    """Source of the prompts. Unset: input-file with a sample_input_file, else unconditional."""

    sample_input_file: PathText | None = None
    """File of prompts; -: standard input."""

    sample_input_format: Literal["text", "jsonl"] | None = None
    """text: prompts separated by prompt_end. jsonl: an object on each line, with prompt (a text) or messages (a chat),
    and keys of its own: seed, and those of this group up to return_logits. Unset: jsonl for a file .jsonl, else text.
    """

    prompt_end: str = "\n"
    """Separates prompts in the input file, and ends an interactive prompt."""

    chat: bool = False
    """Prompts are messages to a model trained on chats: the chat template writes them, and ends its answers."""

    sample_output_file: PathText = "samples.txt"
    """File for the generated texts, as JSON lines. If it holds texts of the same prompts, model and settings, they are
    kept and the others are added."""

    overwrite_samples: bool = False
    """Replace texts of another job in sample_output_file, instead of refusing to."""

    generation_batch_size: PositiveInt = 8
    """Texts computed at once, per replica."""

    prefill_chunk_size: PositiveInt = 512
    """Most tokens of prompts that are read in one forward pass."""

    sample_prompts: tuple[str, ...] | PathText | None = None
    """train.py: a list of texts that are continued during training, or a file of prompts as for sample_input_file. The
    keys of this group up to return_logits say how. Unset: none."""

    sample_interval: PositiveInt | None = None
    """train.py: steps between continuations of sample_prompts, which are also continued after the last step."""

    quantization: Quantization | None = None
    """int8: generate and evaluate, on a CPU, with the weights of matrix products rounded to 8 bits, each output with
    its own scale. They take half the memory of 16 bits; bench/README.md has what it costs. Unset: as trained."""
