"""The commands of docs/finetune.md, in their order, on a tiny model that stands where the published one would be."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from tests.end_to_end.commands import ROOT, finished, json_lines, losses
from tests.tokenizer_files import TEXT, bpe_file

PAGE = ROOT / "docs" / "finetune.md"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def commands(page: str) -> list[list[str]]:
    """The words of each command in the page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def write_model(folder: Path) -> None:
    """A GPT-NeoX of 2 small layers, with a tokenizer and a chat template."""
    folder.mkdir(parents=True)
    bpe_file(folder)
    config = transformers.GPTNeoXConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    settings = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_texts(folder: Path) -> None:
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": text * 4}) + "\n" for text in TEXT))
    talk = [{"role": role, "content": TEXT[0]} for role in ("user", "assistant") * 2]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    (folder / "prompts.txt").write_text("The quick brown\n")
    (tune,) = re.findall(r"^```yaml\n# tune.yml\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (folder / "tune.yml").write_text(tune)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_command_of_the_page_works_in_its_order_and_the_model_predicts_better_afterwards(tmp_path):
    write_model(tmp_path / "EleutherAI" / "pythia-160m")
    write_texts(tmp_path)
    perplexities = []
    for words in commands(PAGE.read_text()):
        script, *rest = words[1:] if words[0] == "python" else words
        # one rank, and a rate for a model that knows nothing yet; few steps where attention by blocks is compiled
        quick = ["num_gpus=1", "num_workers=0", "optimizer.params.lr=1e-2"] if script.endswith("deepy.py") else []
        quick += ["train_iters=4"] if "reset_attention_mask=true" in rest else []
        options = {"input": "The quick\n"} if "text_gen_type=interactive" in rest else {}
        done = finished(tmp_path, script.removeprefix("./"), *rest, *quick, **options)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        if "evaluate.py" in rest:
            newest = max(tmp_path.rglob("eval_results_*.json"), key=lambda path: path.stat().st_mtime_ns)
            perplexities.append(json.loads(newest.read_text()))
    before, after = (float(found["results"]["valid"]["token_perplexity"]) for found in perplexities)
    assert after < 0.5 * before  # the texts repeat themselves, and 80 steps are plenty
    assert max(losses(tmp_path / "tuned")) == 80
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(exported) is transformers.GPTNeoXForCausalLM
    assert json_lines(tmp_path / "answers.jsonl")[0]["context"] == "The quick brown"
    assert (tmp_path / "tuned_on_chats" / "latest").is_file()
