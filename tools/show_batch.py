"""Show what a step of a training run reads: number, corpus and text of each sample. Does not train.

    python tools/show_batch.py configs/default.yml --step 100
    python tools/show_batch.py -d configs 125M local_setup train_batch_size=64 --step 1 --length 80

Steps are numbered as in the log, from 1. If the run has a checkpoint before the step (in load, else save), samples are
counted from there, which respects a batch size that changed during the run.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.checkpoint.folder import checkpoint_name, steps_in
from megatron.checkpoint.state import TrainState
from megatron.config.load import load_config
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.blend import Blend
from megatron.data.build import Sources
from megatron.data.packing import DocumentSamples
from megatron.data.windows import NOT_A_LABEL, SampleSource, Tokens, Windows
from megatron.errors import exit_code
from megatron.resources import open_data, open_tokenizer
from megatron.tokenizer.base import Tokenizer


def parse(arguments: Sequence[str]) -> Namespace:
    """Files, overrides and the step."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", nargs="*", help="as for deepy.py: files, and key=value")
    parser.add_argument("-d", metavar="DIR", dest="folder", help="folder of the files")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="step of the run, from 1")
    parser.add_argument("--length", type=int, default=200, metavar="N", help="characters of each sample (200); 0: all")
    parser.add_argument("--world-size", type=int, metavar="RANKS", help="if train_batch_size is not set")
    options = parser.parse_args(arguments)
    if options.step < 1:
        parser.error(f"--step ({options.step}) must be at least 1")
    return options


def main(options: Namespace) -> None:
    """Print one step. Raises UserError for whatever is wrong with the configuration or the data."""
    files = [word for word in options.config if "=" not in word]
    config = load_config(files, options.folder, [word for word in options.config if "=" in word])
    tokenizer = open_tokenizer(config)
    world_size = options.world_size or config.parallelism.model_parallel_size * max(
        1, config.parallelism.pipe_parallel_size
    )
    size = resolve(config, world_size, tokenizer.vocab_size).batch.global_size
    sources, state = open_data(config, tokenizer.vocab_size), state_before(config, options.step)
    first = state.consumed_samples + (options.step - 1 - state.step) * size
    counted = f", counted from the checkpoint of step {state.step}" if state.step else ""
    print(f"step {options.step}: samples {first:,} to {first + size - 1:,}{counted}")
    source = sources.samples("train")
    for sample in range(first, first + size):
        ids = source[sample][..., : used_length(source, sample)]
        print(f"{sample}\t{origin(sources, source, sample)}\t{shown(ids, tokenizer, options.length)}")


def state_before(config: Config, step: int) -> TrainState:
    """Progress of the run at its last checkpoint before `step`; of its beginning if there is none."""
    name = config.checkpoint.load or config.checkpoint.save
    folder = Path(name) if name else None
    steps = [done for done in steps_in(folder) if done < step] if folder and not config.checkpoint.finetune else []
    if not steps or folder is None:
        return TrainState()
    progress = json.loads((folder / checkpoint_name(steps[-1]) / "progress.json").read_text())
    return TrainState.of(progress)


def origin(sources: Sources, source: SampleSource, sample: int) -> str:
    """Where a sample comes from: corpus, its epoch there, and its place."""
    words = []
    if isinstance(source, Blend):
        number, sample = source.place(sample)
        source = source.sources[number]
        words.append(sources.corpora["train"][number].name)
    words.append(f"epoch {sample // source.samples_per_epoch}")
    if isinstance(source, Windows):
        words.append(f"from token {source.start_of(sample):,}")
    if isinstance(source, DocumentSamples):
        documents = source.documents_of(sample)
        words.append(
            f"documents {documents[0]:,} to {documents[-1]:,}" if documents[1:] else f"document {documents[0]:,}"
        )
    return ", ".join(words)


def used_length(source: SampleSource, sample: int) -> int | None:
    """Number of tokens of a sample without padding; None if there is no padding."""
    if isinstance(source, Blend):
        number, sample = source.place(sample)
        source = source.sources[number]
    return source.length_of(sample) if isinstance(source, DocumentSamples) else None


def shown(ids: Tokens, tokenizer: Tokenizer, length: int) -> str:
    """The text on one line; [brackets] around loss-masked tokens, if there are labels."""
    if ids.ndim == 1:
        text = tokenizer.decode(ids.tolist())
    else:
        tokens, learned = ids[0], ids[1] != NOT_A_LABEL
        runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(learned)) + 1)
        parts = [(tokenizer.decode(tokens[run].tolist()), bool(learned[run[0]])) for run in runs]
        text = "".join(part if is_learned else f"[{part}]" for part, is_learned in parts)
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return line if not length or len(line) <= length else line[:length] + "..."


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse(sys.argv[1:]))))
