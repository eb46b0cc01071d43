"""Chats become prompts by the model's template, and answers end where the template ends them."""

import pytest
from tokenizers import Tokenizer

from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.generation.chat import open_chat
from megatron.tokenizer.build import build_tokenizer
from tests.tokenizer_files import bpe_file
from tests.unit.test_preprocessing_chat_templates import CHATML, GEMMA, MISTRAL

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Who?"},
]
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A tokenizer.json with the special tokens of ChatML."""
    file = bpe_file(tmp_path_factory.mktemp("chat"))
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(file)
    return file


@pytest.fixture
def chat(vocabulary, tmp_path):
    def opened(template: str, **keys):
        (tmp_path / "own.jinja").write_text(template)
        keys = {"vocab_file": vocabulary, "chat_template": str(tmp_path / "own.jinja")} | keys
        return open_chat(TokenizerKeys(**keys), build_tokenizer("HFTokenizer", vocabulary))

    return opened


def test_the_prompt_of_a_chat_ends_where_the_model_is_to_answer(chat):
    prompt = chat(CHATML).prompt(CHAT)
    assert prompt.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    ids = chat(CHATML).encode(prompt)
    assert chat(CHATML).tokenizer.decode(ids) == prompt
    assert ids.count(chat(CHATML).encode("<|im_end|>")[0]) == 3


def test_an_answer_ends_with_the_token_that_the_template_writes_after_it(chat):
    chats = chat(CHATML)
    assert chats.end_of_answer == ((), frozenset(chats.encode("<|im_end|>")))


@pytest.mark.parametrize(
    ("template", "strings"),
    [(GEMMA.replace("{{ bos_token }}", ""), ("<end_of_turn>",)), (PLAIN, ())],
    ids=["text that is no token", "white space"],
)
def test_without_such_a_token_an_answer_ends_with_the_text_that_the_template_writes_after_it(chat, template, strings):
    assert chat(template).end_of_answer == (strings, frozenset())


def test_the_end_of_the_document_is_no_further_stop_token(chat):
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    assert chat(template).end_of_answer == ((), frozenset())


def test_messages_that_the_template_rejects_are_refused_with_its_reason(chat):
    with pytest.raises(UserError, match="the chat template rejects it: roles must alternate"):
        chat(MISTRAL.replace("{{ bos_token }}", "")).prompt([CHAT[0], CHAT[2]])


def test_where_there_is_no_template_the_key_that_gives_one_is_named(chat):
    with pytest.raises(UserError, match=r"there is no chat template in .*; give the file of one with chat_template"):
        chat(CHATML, chat_template=None)
