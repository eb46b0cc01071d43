"""Data keys: corpora, their weights, and how tokens are packed into samples."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import Group, NotNegativeInt, PathText, PositiveFloat

Paths = tuple[PathText, ...] | None
Weights = tuple[PositiveFloat, ...] | None


def _joined_shares(value: object) -> object:
    """The shares as text; a number and a list of numbers are accepted too."""
    shares = value if isinstance(value, tuple) else (value,)
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    return ", ".join(str(share) for share in shares) if shares and numbers else value


Split = Annotated[str, BeforeValidator(_joined_shares)]


class DataKeys(Group):
    """Token files."""

    data_path: PathText | None = None
    """Prefix of the .bin and .idx files, such as data/corpus_text_document; divided by split."""

    split: Split = "969, 30, 1"
    """Shares of training, validation and test in data_path, in documents, or in tokens for a corpus of one document."""

    train_data_paths: Paths = None
    """Prefixes of several training corpora, instead of data_path and split."""

    valid_data_paths: Paths = None
    """Prefixes for validation, with train_data_paths; each corpus has its own loss. Unset: no validation."""

    test_data_paths: Paths = None
    """Prefixes for the test, with train_data_paths."""

    train_data_weights: Weights = None
    """Weights of train_data_paths: relative numbers of samples. Unset: equal."""

    valid_data_weights: Weights = None
    """Weights of valid_data_paths."""

    test_data_weights: Weights = None
    """Weights of test_data_paths."""

    weight_by_num_documents: bool = False
    """Weight each corpus by (number of documents) ** weighted_sampler_alpha."""

    weighted_sampler_alpha: Annotated[float, Field(ge=0, le=10)] = 1.0
    """With weight_by_num_documents: 1: proportional to the number of documents; 0: equal."""

    train_label_data_paths: Paths = None
    """Labels for train_data_paths, one per token, -100 where the loss is masked; one prefix per corpus."""

    valid_label_data_paths: Paths = None
    """Labels for valid_data_paths."""

    test_label_data_paths: Paths = None
    """Labels for test_data_paths."""

    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """packed: samples are slices of the token stream, which may begin and end inside a document.
    pack_until_overflow: as many whole documents as fit. unpacked: one document. Padding is masked from the loss."""

    allow_chopped: bool = True
    """pack_until_overflow and unpacked: truncate documents that are too long; false: skip them."""

    data_impl: Literal["mmap", "mock", "infer"] = "mmap"
    """mmap: read files; mock: random text, for tests; infer: the same as mmap."""

    num_workers: NotNegativeInt = 2
    """Data loading processes per rank."""

    eod_mask_loss: bool = False
    """Mask the loss of the token after the end of a document."""

    reset_attention_mask: bool = False
    """Tokens attend only to their own document. Documents must end with the tokenizer's end-of-document token
    (preprocess_data.py --append-eod)."""

    reset_position_ids: bool = False
    """Restart positions at each document."""
