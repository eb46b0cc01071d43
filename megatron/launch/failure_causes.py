"""Why ranks end, in words: from the text of an exception or from the code that a process left.

Standard library only.
"""

import re
import signal

SIGNALS_IN_WORDS = {
    signal.SIGKILL: "the machine's memory was not used up, so a scheduler or a person did it",
    signal.SIGBUS: "usually because shared memory (/dev/shm) is too small; in a container raise --shm-size",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGABRT: "compiled code gave up",
    signal.SIGILL: "compiled code for another processor",
}
OUT_OF_MEMORY = "the machine's memory was used up, and the kernel chose it"
# The first pattern that is found in the text counts; what is more telling comes first.
CAUSES = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU's memory is used up; a smaller train_micro_batch_size_per_gpu, checkpoint_activations: true, a higher "
        "ZeRO stage or more model_parallel_size need less (--dry-run shows the memory per rank)",
    ),
    (
        r"DataLoader worker \(pid.*killed by signal: Bus error|No space left on device.*/dev/shm|shared memory|"
        r"unable to (open|mmap|write to file) .*torch_",
        "shared memory (/dev/shm) is exhausted; num_workers: 0 needs none, a container wants a larger --shm-size",
    ),
    (
        r"DataLoader worker \(pid.*killed by signal: Killed",
        "a process that reads data was killed, usually because the machine's memory is used up; lower num_workers",
    ),
    (
        r"DefaultCPUAllocator: .*(can't|not enough)|^MemoryError|Cannot allocate memory",
        "the machine's memory is used up; a smaller micro-batch or fewer ranks per machine need less",
    ),
    (r"No space left on device", "a disk is full"),
    (
        r"Watchdog caught collective operation timeout|NCCL.*[Tt]imeout|ncclRemoteError|Timed out waiting \d+ms|"
        r"collective operation timed out",
        "a collective timed out: another rank never came. The roll-call of the watchdog names it; check that rank's "
        "log, and the network with NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME",
    ),
    (
        r"Connection (closed by peer|reset by peer)|Broken pipe|ncclSystemError|Software caused connection abort",
        "it lost its connection to another rank, which ended first or whose network failed",
    ),
    (r"EADDRINUSE|[Aa]ddress already in use", "master_port is taken by another process; leave it unset for a free one"),
    (
        r"unhandled cuda error|device-side assert|CUDA error",
        "a GPU reported an error; CUDA_LAUNCH_BLOCKING=1 shows the operation",
    ),
)  # fmt: skip


def cause_in_words(text: str) -> str | None:
    """What the end of an output or a traceback comes down to; None if it says it well enough itself."""
    tail = "\n".join(text.splitlines()[-30:])
    return next((words for pattern, words in CAUSES if re.search(pattern, tail, re.MULTILINE)), None)


def death_in_words(code: int | None, out_of_memory: bool = False) -> str:
    """What an exit code means; a signal's number is negative. out_of_memory: what the kernel says about it."""
    if code is None:
        return "is gone, and nobody knows its exit code"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"ended with code {code} without a word"
    reason = OUT_OF_MEMORY if out_of_memory and number == signal.SIGKILL else SIGNALS_IN_WORDS.get(number)
    return f"was ended by {number.name}" + (f": {reason}" if reason else "")
