"""Peak memory of taking models of Hugging Face in and out, with the comparison of both sides.

    python bench/convert.py [--sizes 0.1 0.5 2] [--folder DIR]

Models like Llama in fp32, made on the spot. Measured is the peak of resident memory (Linux) above that after the
imports, mapped pages of files included, against the bound: twice the largest tensor and 128 MiB.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # GB in fp32: layers, hidden size, width of the feed-forward layer, vocabulary
    "0.1": (6, 384, 1024, 16000),
    "0.5": (12, 768, 2048, 32000),
    "2": (14, 1536, 4096, 32000),
}


def make(folder: Path, size: str) -> tuple[int, int]:
    """Write a model with random weights. Returns the bytes of all tensors, and of the largest."""
    import torch

    from megatron.convert.family import family_of
    from megatron.hugging_face.published import expected_shapes
    from megatron.hugging_face.safetensors_writer import write_shards
    from tests.tokenizer_files import bpe_file

    layers, hidden, width, vocabulary = SHAPES[size]
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": width}
    config |= {"num_attention_heads": hidden // 64, "vocab_size": vocabulary, "max_position_embeddings": 2048}
    family = family_of(config)
    model = family.model(config)
    shapes = expected_shapes(family.parameters(model), model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[-1])

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    bpe_file(folder)
    write_shards(folder, shapes, tensors(), torch.float32, 5 * 10**9)
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def convert(way: str, source: Path, output: Path) -> dict[str, float]:
    """Convert in this process: seconds, and bytes of memory above that after the imports."""
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401 (imported when it is first named)

    from megatron.hugging_face.incoming import import_model
    from megatron.hugging_face.memory import return_freed_tensors
    from megatron.hugging_face.outgoing import export_model, open_checkpoint, plan_export
    from megatron.hugging_face.published import open_published

    transformers.CONFIG_MAPPING["llama"]
    return_freed_tensors()
    before, started = memory("VmRSS"), time.perf_counter()
    if way == "in":
        import_model(open_published(str(source)), output, check=True, tell=lambda line: None)
    else:
        trained = open_checkpoint(source, None, {})
        export = plan_export(trained.model, trained.vocab_file, trained.tokenizer, "fp32")
        export_model(trained, export, output, tell=lambda line: None)
    return {"seconds": time.perf_counter() - started, "bytes": memory("VmHWM") - before}


def memory(what: str) -> int:
    """Bytes of this process, as the kernel reports them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def measure(way: str, source: Path, output: Path) -> dict[str, float]:
    """`convert` in a process of its own."""
    words = [sys.executable, __file__, "--one", way, str(source), str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="GB of the models")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(convert(options.one[0], *map(Path, options.one[1:]))))
        return
    print("| model | largest tensor | way | peak memory | bound | time |\n|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            whole, largest = make(folder / "theirs", size)
            for way, source, output in (("in", "theirs", "ours"), ("out", "ours", "back")):
                found = measure(way, folder / source, folder / output)
                bound = 2 * largest + 2**27
                print(
                    f"| {whole / 1e9:.2f} GB | {largest / 2**20:.0f} MiB | {way} | {found['bytes'] / 2**20:.0f} MiB | "
                    f"{bound / 2**20:.0f} MiB | {found['seconds']:.0f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
