"""What is said about GPUs before a run starts: real calls to a library that stands in for the driver's."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron.config.load import config_from_flat
from megatron.launch.launchers.launcher import LaunchSpec, agent_command
from megatron.launch.restarting import supervise
from tests.nvml_library import COMPILER, build, cards, environment, fake_torch

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the library that plays NVML")
SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}
H100 = ("NVIDIA H100 80GB HBM3", 81559, 4, 0)
PROGRAM = """
import json, sys
from megatron.errors import UserError
from megatron.launch import gpu_checks
from megatron.launch.accelerators import visible_gpus
backend, asked, seconds, share = json.loads(sys.argv[1])
gpu_checks.FREEING_SECONDS = seconds
import os
chosen = visible_gpus(os.environ, backend)[:asked]
try:
    print(json.dumps([chosen, gpu_checks.check_gpus(os.environ, backend, chosen, share), []]))
except UserError as error:
    print(json.dumps([chosen, [], error.problems]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def torch(tmp_path) -> Path:
    return fake_torch(tmp_path / "with_cuda")


def checked(variables: dict[str, str], backend=None, asked=8, seconds=0.0, share=0.1) -> tuple[list, list, list]:
    """The GPUs that ranks would use, the warnings, and the problems."""
    settings = json.dumps([backend, asked, seconds, share])
    command = [sys.executable, "-P", "-c", PROGRAM, settings]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60, check=True)
    return tuple(json.loads(done.stdout))


def test_free_gpus_that_nvml_counts_are_used_without_a_word(library, torch):
    """Under WSL there is no /dev/nvidia0 either."""
    assert checked(environment(library, torch, **cards(H100, H100))) == (["0", "1"], [], [])


def test_without_nvml_and_gpus_a_run_uses_the_cpu_without_a_word(tmp_path):
    if Path("/dev/dxg").exists() or list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    assert checked(environment(None, fake_torch(tmp_path, "2.13.0+cpu", None))) == ([], [], [])


def test_a_gpu_that_torch_cannot_use_is_warned_of_unless_the_cpu_was_chosen(library, tmp_path):
    variables = environment(library, fake_torch(tmp_path, "2.13.0+cpu", None), **cards(H100, H100))
    chosen, [warning], problems = checked(variables)
    assert (chosen, problems) == ([], [])
    assert warning == (
        "the run uses the CPU although there is NVIDIA H100 80GB HBM3: the installed torch 2.13.0+cpu is built without "
        "CUDA; install one that is built with it. DS_ACCELERATOR=cpu chooses the CPU in silence"
    )
    assert checked(variables | {"DS_ACCELERATOR": "cpu"}) == ([], [], [])
    assert checked(variables | {"CUDA_VISIBLE_DEVICES": ""}) == ([], [], [])
    assert checked(variables, backend="gloo") == ([], [], [])


def test_gpus_that_are_asked_for_and_cannot_be_had_end_the_run_with_the_reason(library, torch, tmp_path):
    without = fake_torch(tmp_path / "without_cuda", "2.13.0+cpu", None)
    there, by_key = cards(H100), "distributed_backend: nccl"
    for variables, backend, asked, why in (
        (
            environment(library, without, **there),
            "nccl",
            by_key,
            "the installed torch 2.13.0+cpu is built without CUDA",
        ),
        (environment(library, torch), "nccl", by_key, "the driver reports none (no device)"),
        (environment(library, torch, DS_ACCELERATOR="cuda"), None, "DS_ACCELERATOR=cuda", "the driver reports none"),
        (environment(library, torch, CUDA_VISIBLE_DEVICES="-1", **there), "nccl", by_key, 'VISIBLE_DEVICES is "-1"'),
        (environment(library, torch, DS_ACCELERATOR="cpu", **there), "nccl", by_key, "DS_ACCELERATOR=cpu hides them"),
    ):
        _, warnings, [problem] = checked(variables, backend)
        assert warnings == [] and problem.startswith(f"{asked} needs GPUs, but ") and why in problem
        assert problem.endswith("; distributed_backend: gloo computes on the CPU")


def test_a_gpu_that_is_named_and_not_there_is_refused_and_a_uuid_may_name_one(library, torch):
    variables = environment(library, torch, **cards(H100, H100))
    assert checked(variables | {"CUDA_VISIBLE_DEVICES": "1,GPU-0"})[1:] == ([], [])
    _, _, problems = checked(variables | {"CUDA_VISIBLE_DEVICES": "1,2,GPU-7,1,MIG-1"})
    assert problems == [
        "CUDA_VISIBLE_DEVICES names GPU 1 more than once; each rank needs a GPU of its own",
        "GPU 2 is asked for (CUDA_VISIBLE_DEVICES), but this machine has 2: 0 to 1",
        "GPU GPU-7 is asked for (CUDA_VISIBLE_DEVICES), but this machine has 2: 0 to 1",
    ]


def test_a_busy_gpu_is_refused_with_its_processes_unless_it_is_allowed_or_not_used(library, torch):
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        busy = ("NVIDIA H100 80GB HBM3", 81559, 40960, sleeper.pid)
        variables = environment(library, torch, **cards(H100, busy))
        _, _, [problem] = checked(variables)
        assert problem == (
            "GPU 1 (NVIDIA H100 80GB HBM3): other processes hold 40.0 of 79.6 GiB, and max_gpu_memory_in_use is 0.1 of "
            f"it: {sleeper.pid} (sleep); end them, choose other GPUs with CUDA_VISIBLE_DEVICES, or raise "
            "max_gpu_memory_in_use (1: not checked)"
        )
        assert checked(variables, share=0.6)[2] == checked(variables, asked=1)[2] == []
    finally:
        sleeper.kill()
        sleeper.wait()


def test_memory_that_an_ended_process_gives_back_in_a_moment_is_waited_for(library, torch, tmp_path):
    freed = tmp_path / "freed"
    variables = environment(library, torch, FAKE_NVML_FREED=str(freed), **cards(("A card", 1000, 900, 0)))
    timer = threading.Timer(0.5, freed.touch)
    timer.start()
    assert checked(variables, seconds=30.0)[2] == []
    assert freed.exists()


def test_a_driver_that_is_too_old_for_torch_is_refused_with_both_versions(library, torch, tmp_path):
    old = {"FAKE_NVML_DRIVER": "550.54.15", "FAKE_NVML_CUDA": "12040", **cards(H100)}
    assert checked(environment(library, torch, **old))[2] == [
        "the NVIDIA driver 550.54.15 runs CUDA 12.4, but the installed torch 2.13.0+cu130 is built for CUDA 13.0; "
        "install driver 580 or newer, or a torch for CUDA 12"
    ]
    same_major = fake_torch(tmp_path / "12.8", "2.11.0+cu128", "12.8")
    assert checked(environment(library, same_major, **old))[2] == []


def test_a_driver_that_does_not_answer_is_refused_in_its_words(library, torch):
    named = {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NVML_INIT": "18"}
    assert checked(environment(library, torch, **named))[2] == [
        "the NVIDIA driver cannot be used: RM has detected an NVML/RM version mismatch; "
        "reload it, or restart the machine"
    ]


def test_a_torch_without_nccl_is_refused(library, tmp_path):
    _, _, [problem] = checked(environment(library, fake_torch(tmp_path, nccl=False), **cards(H100)))
    assert problem.startswith(
        "the installed torch 2.13.0+cu130 is built without NCCL, by which GPUs communicate; install"
    )


def test_a_driver_without_the_newer_calls_is_asked_by_the_older_ones(torch, tmp_path):
    library = build(tmp_path / "old", old=True)
    _, _, [problem] = checked(environment(library, torch, **cards(("A card", 1000, 900, 0))))
    assert "GPU 0 (A card): other processes hold 0.9 of 1.0 GiB" in problem and "not visible from here" in problem


def test_a_card_whose_memory_is_the_machines_own_is_not_called_busy(library, torch):
    assert checked(environment(library, torch, **cards(("NVIDIA GB10", 0, 0, 0)))) == (["0"], [], [])


def test_no_rank_starts_on_any_node_when_one_node_has_a_problem(library, torch, tmp_path, monkeypatch, capfd):
    """Two nodes on this machine, with their agents; both have a GPU, and the second is told to use another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text("import pathlib; pathlib.Path('started').touch()\n")
    for name, value in environment(library, torch, **cards(H100)).items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)

    def command(folder: Path, _: object) -> list[str]:
        first, second = (" ".join(agent_command(folder, "--node", number)) for number in "01")
        return ["sh", "-c", f"{first} & CUDA_VISIBLE_DEVICES=7 {second} & wait"]

    launch = LaunchSpec(("one", "two"), ((0,), (0,)), command, "127.0.0.1", remote=False, settings={})
    code = supervise(launch, config_from_flat(SHAPE), tmp_path / "program.py")
    assert capfd.readouterr().err == "two: GPU 7 is asked for (CUDA_VISIBLE_DEVICES), but this machine has 1: 0 to 0\n"
    assert code == 2 and not (tmp_path / "started").exists()
