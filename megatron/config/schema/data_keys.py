"""Keys of the training data: which corpora, in which proportion, and how their tokens become samples."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import Group, NotNegativeInt, PathText, PositiveFloat

Paths = tuple[PathText, ...] | None
Weights = tuple[PositiveFloat, ...] | None


def _joined_shares(value: object) -> object:
    """The shares as text: a single number and a list of numbers may be written too."""
    shares = value if isinstance(value, tuple) else (value,)
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    return ", ".join(str(share) for share in shares) if shares and numbers else value


Split = Annotated[str, BeforeValidator(_joined_shares)]


class DataKeys(Group):
    """Token files."""

    data_path: PathText | None = None
    """Prefix of the .bin and .idx files, such as data/mine_text_document; split divides them."""

    split: Split = "969, 30, 1"
    """Shares of training, validation and test in data_path; by document, or by token for a corpus of one document."""

    train_data_paths: Paths = None
    """Prefixes of several corpora to train on, in place of data_path and split."""

    valid_data_paths: Paths = None
    """Prefixes for validation, beside train_data_paths; each corpus has its own loss. Unset: no validation."""

    test_data_paths: Paths = None
    """Prefixes for the test, beside train_data_paths."""

    train_data_weights: Weights = None
    """Shares of the samples of each of train_data_paths; any positive numbers. Unset: equal."""

    valid_data_weights: Weights = None
    """Shares of valid_data_paths."""

    test_data_weights: Weights = None
    """Shares of test_data_paths."""

    weight_by_num_documents: bool = False
    """Give each corpus a weight of (its documents) ** weighted_sampler_alpha."""

    weighted_sampler_alpha: Annotated[float, Field(ge=0, le=10)] = 1.0
    """With weight_by_num_documents: 1 is in proportion to the documents, 0 the same for all."""

    train_label_data_paths: Paths = None
    """Labels for train_data_paths, token by token, -100 where nothing is to be learned; one prefix for each."""

    valid_label_data_paths: Paths = None
    """Labels for valid_data_paths."""

    test_label_data_paths: Paths = None
    """Labels for test_data_paths."""

    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """packed: samples are cut from the stream of tokens, and may begin and end inside a document.
    pack_until_overflow: whole documents, as many as fit. unpacked: one document. The rest is filled up, unlearned."""

    allow_chopped: bool = True
    """pack_until_overflow and unpacked: cut documents that are too long; false: leave them out."""

    data_impl: Literal["mmap", "mock", "infer"] = "mmap"
    """mmap reads files; mock makes up text, for trying things out; infer means mmap."""

    num_workers: NotNegativeInt = 2
    """Processes per rank that read ahead."""

    eod_mask_loss: bool = False
    """Do not learn to predict what follows the end of a document."""

    reset_attention_mask: bool = False
    """Keep the documents of a sample apart: no token attends to another document. They end with the tokenizer's
    end-of-document token (preprocess_data.py --append-eod)."""

    reset_position_ids: bool = False
    """Count positions from the beginning of each document."""
