"""bench/serve.py: our server and Transformers behind FastAPI, asked by the same clients."""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.commands import ENVIRONMENT, ROOT


@pytest.mark.long
def test_both_servers_write_the_same_texts_and_ours_outlasts_clients_that_leave(tmp_path):
    words = ["--quick", "--clients", "2", "--requests", "40"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "serve.py"), *words],
        cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    measured, soaked = figures["throughput"]["2"], figures["soak"]
    assert measured["requests"] == 8
    assert measured["same_texts"] >= 7  # of two tokens that are almost as likely each side may choose another
    assert measured["serve.py"]["errors"] == measured["Transformers"]["errors"] == []
    assert (soaked["requests"], soaked["left"], soaked["problems"]) == (40, 4, [])
