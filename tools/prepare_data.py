"""Prepare a named corpus for training: text, a tokenizer trained on it, token files. Existing files are kept.

    python tools/prepare_data.py stdlib        ->  data/stdlib/{stdlib.jsonl, tokenizer.json, stdlib_text_document.*}
    python tools/prepare_data.py roneneldan/TinyStories --num-docs 100000     any Hugging Face dataset with a "text"

stdlib needs no network.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from megatron.errors import exit_code
from megatron.files import replaced_when_complete
from megatron.preprocessing.commands import (
    describe_pair,
    new_parser,
    output_locked,
    path,
    positive,
    progress,
    with_dashes,
)
from megatron.preprocessing.corpora import Corpus, from_hugging_face
from megatron.preprocessing.documents import read_texts
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import choose
from megatron.preprocessing.job import Job, Texts
from megatron.preprocessing.pipeline import preprocess
from megatron.registry import names, resolve
from megatron.tokenizer.build import TokenizerSettings
from megatron.tokenizer.train import train_byte_level_bpe

TRAINED_CHARACTERS = 200_000_000  # that a tokenizer is trained on, at most
TRAINED_SHARE = 0.95  # of the documents: the rest is held out, by the split of configs/default.yml and by the usual one


def parse(arguments: Sequence[str]) -> Namespace:
    """The name of a corpus, and its folder."""
    parser = new_parser(__doc__)
    known = ", ".join(names("corpus"))
    parser.add_argument("name", metavar="CORPUS", help=f"{known}, or OWNER/DATASET[:CONFIG[:SPLIT]] of Hugging Face")
    parser.add_argument("-n", "--num-docs", type=positive, metavar="N", help="the first N documents only")
    parser.add_argument(
        "-d", "--data-dir", type=path, default="data", metavar="DIR", help="files go to DIR/CORPUS (data)"
    )
    parser.add_argument("-f", "--force", action="store_true", help="make all files again")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Run the steps whose files are missing, and all steps after one that was run."""
    is_registered = arguments.name in names("corpus") or "/" not in arguments.name
    corpus: Corpus = resolve("corpus", arguments.name) if is_registered else from_hugging_face(arguments.name)
    name = arguments.name.replace("/", "--").replace(":", "--")
    folder = Path(arguments.data_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    text, tokenizer, prefix = folder / f"{name}.jsonl", folder / "tokenizer.json", folder / name
    pair = f"{prefix}_text_document"
    steps: tuple[tuple[Path, str, Callable[[], str]], ...] = (
        (text, f"writing {corpus.description}", lambda: write_text(corpus, text, arguments.num_docs)),
        (tokenizer, "training a byte-level BPE", lambda: train(corpus, text, tokenizer)),
        (Path(f"{pair}.idx"), "tokenizing", lambda: tokenize(text, tokenizer, str(prefix))),
    )
    stale = arguments.force
    with output_locked(str(prefix)):
        for file, doing, make in steps:
            if file.exists() and not stale:
                print(f"{file} exists")
                continue
            print(f"{file}: {doing}", flush=True)
            print(f"  {make()}", flush=True)
            stale = True
    print(describe_pair(pair))
    print(f"ready: data_path: {pair}, tokenizer_type: HFTokenizer, vocab_file: {tokenizer}")


def write_text(corpus: Corpus, path: Path, limit: int | None = None) -> str:
    """Write the documents, at most `limit`, as JSON lines; the file gets its name when it is complete."""
    documents = size = 0
    with replaced_when_complete(path) as file:
        for document in islice(corpus.documents(path.parent), limit):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            documents, size = documents + 1, size + len(document.encode())
    return f"{documents:,} documents, {size:,} bytes of text"


def train(corpus: Corpus, text: Path, path: Path) -> str:
    """Train the tokenizer of the corpus on the documents that models are trained on."""
    return f"{train_byte_level_bpe(beginning(text), corpus.vocab_size, str(path)):,} ids"


def beginning(text: Path) -> Iterator[str]:
    """The documents that are not held out, up to TRAINED_CHARACTERS; the beginning of a single one."""
    with text.open("rb") as file:
        number = sum(1 for _ in file)
    count = 0
    for document in islice(read_texts([str(text)], "text"), max(1, round(TRAINED_SHARE * number))):
        yield document if number > 1 else document[: round(TRAINED_SHARE * len(document))]
        count += len(document)
        if count >= TRAINED_CHARACTERS:
            return


def tokenize(text: Path, tokenizer: Path, prefix: str) -> str:
    """Tokenize all documents, each ended by the end-of-document token."""
    job = Job((str(text),), prefix, form=Texts(append_eod=True))
    settings = TokenizerSettings("HFTokenizer", str(tokenizer))
    with progress(text.stat().st_size, None, sys.maxsize) as show:
        totals = preprocess(job, EncoderSettings(settings, choose(settings)), show)
    return f"{totals.documents:,} documents, {totals.tokens:,} tokens from {totals.text_bytes:,} bytes"


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
