r"""Tokenize instruction data, with labels for the answers only. Writes PREFIX_text_document and PREFIX_label_document.

    python tools/preprocess_instructions.py --input a.jsonl --prompt-key question --completion-key answer \
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json --output-prefix data/qa
    python tools/preprocess_instructions.py --input chats.jsonl --messages-key messages \
        --tokenizer-type HFTokenizer --vocab-file path/to/model --output-prefix data/chats

Messages are rendered by the tokenizer's chat template (tokenizer_config.json or chat_template.jinja next to the
vocabulary, or --chat-template FILE). Train with train_data_paths, train_label_data_paths and, as a rule,
pack_impl: unpacked or pack_until_overflow with reset_attention_mask: true. --workers, --shard, --resume and the rest
are those of tools/preprocess_data.py. See docs/data.md.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from megatron.errors import UserError, exit_code
from megatron.preprocessing.commands import add_work_flags, do_work, new_parser, path, with_dashes
from megatron.preprocessing.record_formats import Chat, PromptAndCompletion, chat_template


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags; those of tools/preprocess_data.py mean the same here."""
    parser = new_parser(__doc__)
    add_work_flags(parser)
    add = parser.add_argument
    add("--prompt-key", metavar="KEY", help="key of the prompt, which is not learned")
    add("--completion-key", metavar="KEY", help="key of the completion, which is learned")
    add("--messages-key", metavar="KEY", help="key of a list of messages, instead of prompt and completion")
    add("--chat-template", type=path, metavar="FILE", help="a template in Jinja (default: the tokenizer's own)")
    add("--chat-date", type=iso_date, metavar="YYYY-MM-DD", help="the date for templates that write today's date")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Tokenize, and print a summary."""
    form = form_of(arguments)
    do_work(arguments, keys=form.keys, form=form)


def form_of(arguments: Namespace) -> PromptAndCompletion | Chat:
    """The format of the records. Raises UserError unless it is prompt and completion, or messages."""
    pair = (arguments.prompt_key, arguments.completion_key)
    of_chats = (arguments.messages_key, arguments.chat_template, arguments.chat_date)
    if all(pair) and not any(of_chats):
        return PromptAndCompletion(*pair)
    if arguments.messages_key and not any(pair):
        file = arguments.chat_template and Path(arguments.chat_template)
        return chat_template(arguments.messages_key, file, arguments.vocab_file, arguments.chat_date)
    raise UserError(
        "give --prompt-key and --completion-key, or --messages-key (and, with it, --chat-template and --chat-date)"
    )


def iso_date(text: str) -> date:
    """Parse YYYY-MM-DD. Raises ArgumentTypeError, which the parser reports."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ArgumentTypeError(f'"{text}" is not a date YYYY-MM-DD') from error


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
