"""Rules between data keys."""

import re
from collections.abc import Iterator

from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config

PARTS = ("train", "valid", "test")
PATHS = tuple(f"{part}_data_paths" for part in PARTS)
WEIGHTS = tuple(f"{part}_data_weights" for part in PARTS)
LABELS = tuple(f"{part}_label_data_paths" for part in PARTS)

DATA_RULES: list[Rule] = []


@rule(DATA_RULES, "split")
def _split_has_three_shares(config: Config) -> Iterator[str]:
    try:
        shares = [float(share) for share in re.split("[,/]", config.data.split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield f'split ("{config.data.split}") must be one to three shares such as "969, 30, 1"'


@rule(DATA_RULES, "data_path", *PATHS)
def _corpora_are_named_once(config: Config) -> Iterator[str]:
    keys = config.data
    words = (keys.data_path or "").split()
    if len(words) >= 4 and len(words) % 2 == 0 and all(word.replace(".", "", 1).isdigit() for word in words[::2]):
        yield (
            f'data_path ("{keys.data_path}") has several paths with weights; write train_data_paths: '
            f"[{', '.join(words[1::2])}] and train_data_weights: [{', '.join(words[::2])}]"
        )
    given = [(key, paths) for key in PATHS if (paths := getattr(keys, key)) is not None]
    for key, paths in given:
        if keys.data_path is not None:
            yield f"data_path ({keys.data_path}) and {key} ({_list(paths)}) exclude each other; keep one of them"
        if not paths:
            yield f"{key} is an empty list; leave it out, or name prefixes of .bin and .idx files"
    if given and keys.train_data_paths is None and keys.data_path is None:
        key, paths = given[0]
        yield f"{key} ({_list(paths)}) needs train_data_paths; with data_path, split divides the data"


@rule(DATA_RULES, *PATHS, *WEIGHTS, *LABELS)
def _lists_belong_to_paths(config: Config) -> Iterator[str]:
    keys = config.data
    for paths_key, *others in zip(PATHS, WEIGHTS, LABELS, strict=True):
        paths = getattr(keys, paths_key) or ()
        for key in others:
            entries = getattr(keys, key)
            if entries is not None and len(entries) != len(paths):
                yield (
                    f"{key} ({_list(entries)}) has {len(entries)} entries and {paths_key} ({_list(paths)}) "
                    f"{len(paths)}; give one for each path"
                )


@rule(DATA_RULES, "train_data_paths", "weight_by_num_documents", "weighted_sampler_alpha", *WEIGHTS)
def _weights_have_one_source(config: Config) -> Iterator[str]:
    keys = config.data
    by_documents, alpha = keys.weight_by_num_documents, keys.weighted_sampler_alpha
    for key in WEIGHTS:
        if by_documents and getattr(keys, key) is not None:
            yield f"weight_by_num_documents (true) and {key} ({_list(getattr(keys, key))}) exclude each other; keep one"
    if by_documents and keys.train_data_paths is None:
        yield "weight_by_num_documents (true) needs train_data_paths, the corpora; with data_path leave it out"
    if not by_documents and alpha != 1:
        yield f"weighted_sampler_alpha ({alpha:g}) has no effect without weight_by_num_documents; set it to true"


@rule(DATA_RULES, "allow_chopped", "pack_impl")
def _chopping_needs_documents(config: Config) -> Iterator[str]:
    if not config.data.allow_chopped and config.data.pack_impl == "packed":
        yield (
            "allow_chopped (false) has no effect with pack_impl (packed), which splits documents anywhere; "
            "use pack_until_overflow or unpacked, or leave it out"
        )


@rule(DATA_RULES, "reset_attention_mask", "attention_dropout")
def _apart_without_attention_dropout(config: Config) -> Iterator[str]:
    if config.data.reset_attention_mask and config.model.attention_dropout:
        yield (
            f"reset_attention_mask (true) excludes attention_dropout ({config.model.attention_dropout:g}), which the "
            "attention kernel for separate documents does not support; set attention_dropout to 0"
        )


def _list(entries: tuple[object, ...]) -> str:
    shown = ", ".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in entries[:3])
    return f"[{shown}{', ...' if len(entries) > 3 else ''}]"
