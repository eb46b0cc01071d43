"""The model of bench/serve.py: random weights, and a tokenizer whose tokens are words, in a folder of Hugging Face."""

import string
from itertools import product
from pathlib import Path

LETTERS = string.ascii_letters
SPACE = "Ġ"  # how byte-level tokenizers write a space
END = "<|endoftext|>"
VOCABULARY = 50304
PARTS = [SPACE, *LETTERS, *(SPACE + a for a in LETTERS), *(SPACE + a + b for a in LETTERS for b in LETTERS)]
WORDS = [" " + "".join(word) for word in product(LETTERS, repeat=3)][: VOCABULARY - len(PARTS) - 1]
SHAPES = {"6x512": (6, 512, 8), "2x64": (2, 64, 4)}  # layers, hidden size, heads
CONTEXT = 512


def write_model(folder: Path, shape: str) -> None:
    """Write a GPT-NeoX that both servers open. Almost every token is a word, so that each gives an event at once."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [SPACE + word[1:] for word in WORDS]
    tokens = [END, *PARTS, *words]
    merges = [(part[:-1], part[-1]) for part in [*PARTS, *words] if len(part) > 1]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    layers, hidden, heads = SHAPES[shape]
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
