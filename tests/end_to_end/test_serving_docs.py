"""The programs of docs/serving.md, against a small model with a chat template."""

import re
import shlex

import httpx
import pytest

from tests.end_to_end.commands import ROOT
from tests.end_to_end.serving import PATIENCE, make_model, serving

PAGE = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.long
def test_the_programs_of_the_page_are_answered(tmp_path, capsys):
    make_model(tmp_path)
    [request] = [block for block in blocks("bash") if block.startswith("curl")]
    with serving(tmp_path, "chat_template=chat.jinja") as server:
        program = "\n".join(blocks("python")).replace(ADDRESS, server.url)
        exec(compile(program, "docs/serving.md", "exec"), {})
        assert capsys.readouterr().out.strip()
        assert server.figure('deepy_requests_total{endpoint="/v1/chat/completions",status="200"}') == 2
        words = shlex.split(request.replace("\\\n", " ").replace(ADDRESS, server.url))
        assert status_of(words) == 200


def status_of(words: list[str]) -> int:
    """The status of curl's request."""
    headers = dict([words[words.index("-H") + 1].split(": ")])
    return httpx.post(words[1], content=words[words.index("-d") + 1], headers=headers, timeout=PATIENCE).status_code
