"""The command line of deepy.py and of the scripts that it starts.

    deepy.py SCRIPT [CONFIG ...] [-d DIR] [key=value ...] [options]

Flags of keys become `key=value` overrides.
"""

import argparse
import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

from megatron.config.load import OVERRIDE, config_from_flat, find_files, load_config
from megatron.config.origin import Origin, origin_of
from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.files import is_file

DOORS = {
    "train.py": "train a model",
    "generate.py": "generate text from a checkpoint",
    "evaluate.py": "evaluate a checkpoint",
    "serve.py": "serve a checkpoint over HTTP",
}
MERGED_FLAG = "--merged-config"
# Flags, key, type, help text. A flag overrides the files.
KEY_FLAGS: tuple[tuple[tuple[str, ...], str, type, str], ...] = (
    (("-H", "--hostfile"), "hostfile", str, 'hostfile, with lines such as "node1 slots=8"'),
    (("--num_nodes",), "num_nodes", int, "number of nodes"),
    (("--num_gpus",), "num_gpus", int, "processes per node, on CPU nodes too"),
    (("--include",), "include", str, 'devices to use, such as "localhost:0,2"'),
    (("--exclude",), "exclude", str, 'devices to leave out, such as "localhost:1"'),
    (("--master_addr",), "master_addr", str, "address of rank 0"),
    (("--master_port",), "master_port", int, "port of rank 0"),
    (("--launcher",), "launcher", str, "launcher: local, pdsh, openmpi or slurm"),
    (("-i", "--sample_input_file"), "sample_input_file", str, "file of prompts"),
    (("-o", "--sample_output_file"), "sample_output_file", str, "file for the generated text, as JSON lines"),
    (("--num_fewshot", "--eval_num_fewshot"), "eval_num_fewshot", int, "few-shot examples before each question"),
    (("--limit", "--eval_limit"), "eval_limit", float, "documents of each task; below 1: a fraction of them"),
    (("--include_path", "--eval_include_path"), "eval_include_path", str, "folder with your own tasks"),
    (("--eval_results_prefix",), "eval_results_prefix", str, "prefix of the name of the results file"),
    (("--references", "--eval_references"), "eval_references", str, "file of references for the model's answers"),
    (("--iteration",), "iteration", int, "step of the checkpoint to load"),
    (("--wandb_group",), "wandb_group", str, "Weights & Biases group"),
    (("--wandb_run_name",), "wandb_run_name", str, "Weights & Biases run name"),
    (("--wandb_team",), "wandb_team", str, "Weights & Biases team"),
)


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line. `merged` is the whole configuration, if a launcher passed it on."""

    script: str
    files: tuple[str, ...]
    folder: str | None
    overrides: tuple[str, ...]  # "key=value", flags included
    print_config: bool = False
    dry_run: bool = False
    merged: Config | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().strip()}\n(see --help)")


def parse_command_line(argv: Sequence[str], script: str | None = None) -> CommandLine:
    """Parse the arguments after the program's name.

    script: the script that is running ("train.py"); None: deepy.py, whose first argument names the script.
    Raises UserError.
    """
    options = _parser(script).parse_intermixed_args(list(argv))
    words = list(options.words)
    if script is None and not words:
        raise UserError(f"a script is missing: {', '.join(DOORS)} (see --help)")
    script = script or words.pop(0)
    tasks = [task for task in options.eval_tasks or () if not _is_override(task)]
    words += [word for word in options.eval_tasks or () if _is_override(word)]
    return CommandLine(
        script=script,
        files=tuple(word for word in words if not _is_override(word)),
        folder=options.conf_dir,
        overrides=(*(word for word in words if _is_override(word)), *_flags_as_keys(options, tasks)),
        print_config=options.print_config,
        dry_run=options.dry_run,
        merged=None if options.merged_config is None else config_from_argument(options.merged_config),
    )


def configuration_of(command: CommandLine, words: Sequence[str], script: str, *, planning: bool = False) -> Config:
    """The configuration that a command names, with its origin, unless a launcher passed it on.

    words: program and arguments. script, planning: as for `load_config`. Raises ConfigError.
    """
    if command.merged is not None:
        return command.merged
    config = load_config(command.files, command.folder, command.overrides, script, planning=planning)
    paths, _ = find_files(command.files, command.folder, command.overrides)
    return config.model_copy(update={"origin": origin_of(words, paths, command.overrides)})


def merged_to_argument(config: Config) -> str:
    """Encode a configuration as one word, for the command line of a rank."""
    origin = None if config.origin is None else asdict(config.origin)
    text = json.dumps([config.to_flat(), origin], separators=(",", ":"))
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), level=9)).decode()


def config_from_argument(argument: str) -> Config:
    """Decode what `merged_to_argument` wrote. Raises UserError for anything else."""
    try:
        flat, origin = json.loads(zlib.decompress(base64.urlsafe_b64decode(argument)))
    except (ValueError, zlib.error) as error:
        raise UserError(f"{MERGED_FLAG} is written by deepy.py, not by hand: {error}") from error
    config = config_from_flat(flat, "the configuration that the launcher passed on")
    if origin is None:
        return config
    listed = {name: tuple(origin[name]) for name in ("command", "overrides")}
    files = tuple((path, text) for path, text in origin["files"])
    return config.model_copy(update={"origin": Origin(**origin | listed | {"files": files})})


def _parser(script: str | None) -> _Parser:
    parser = _Parser(
        prog=script or "deepy.py",
        usage=f"{script or 'deepy.py SCRIPT'} [CONFIG ...] [-d DIR] [key=value ...] [options]",
        description="\n".join(f"  {name:12} {what}" for name, what in DOORS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words = "CONFIG or key=value" if script else "SCRIPT, CONFIG or key=value"
    parser.add_argument("words", nargs="*", metavar="ARGUMENT", help=f"{words}; see docs/configuration.md for the keys")
    parser.add_argument("-d", "--conf_dir", "--conf-dir", metavar="DIR", help="folder of the CONFIG files")
    for flags, key, kind, help_text in KEY_FLAGS:
        parser.add_argument(*_both_spellings(flags), dest=key, type=kind, metavar="VALUE", help=help_text)
    tasks = "tasks of the lm-evaluation-harness, separated by spaces or commas"
    parser.add_argument("--eval_tasks", "--eval-tasks", nargs="+", metavar="TASK", help=tasks)
    parser.add_argument(
        "--print-config", action="store_true", help="print the merged and validated configuration, and exit"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and its memory, and exit")
    parser.add_argument(MERGED_FLAG, help=argparse.SUPPRESS)
    return parser


def _both_spellings(flags: tuple[str, ...]) -> list[str]:
    """A flag with `_` and with `-`."""
    dashed = [f"--{flag[2:].replace('_', '-')}" for flag in flags if flag.startswith("--")]
    return list(dict.fromkeys([*flags, *dashed]))


def _is_override(word: str) -> bool:
    """Whether the word is key=value and not the name of a file."""
    return OVERRIDE.fullmatch(word) is not None and not is_file(word)


def _flags_as_keys(options: argparse.Namespace, tasks: list[str]) -> list[str]:
    """Flags as overrides, in JSON, so that "007" stays text."""
    given = {key: getattr(options, key) for _, key, _, _ in KEY_FLAGS}
    if given["sample_input_file"] is not None:
        given["text_gen_type"] = "input-file"
    if tasks:
        given["eval_tasks"] = tasks
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
