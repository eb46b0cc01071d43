"""Likely causes of a rank's failure, from the text of an exception or from an exit code. Standard library only."""

import re
import signal

SIGNALS_IN_WORDS = {
    signal.SIGKILL: "the machine did not run out of memory, so a scheduler or a person killed it",
    signal.SIGBUS: "usually because shared memory (/dev/shm) is too small; in a container raise --shm-size",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGABRT: "compiled code aborted",
    signal.SIGILL: "compiled code for another processor",
}
OUT_OF_MEMORY = "the machine ran out of memory, and the kernel killed it"
TIMED_OUT = (
    "a collective timed out: another rank did not join it. The watchdog's roll call names that rank; check its log, "
    "and the network with NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME"
)
LOST_CONNECTION = "it lost its connection to another rank, which ended first or whose network failed"
OF_OTHERS = (TIMED_OUT, LOST_CONNECTION)  # causes that lie with another rank
# The first pattern found in the text is used, so the more specific ones come first.
CAUSES = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU's memory is used up; a smaller train_micro_batch_size_per_gpu, checkpoint_activations: true, a higher "
        "ZeRO stage or a larger model_parallel_size need less (--dry-run shows the memory per rank)",
    ),
    (
        r"DataLoader worker \(pid.*killed by signal: Bus error|No space left on device.*/dev/shm|shared memory|"
        r"unable to (open|mmap|write to file) .*torch_",
        "shared memory (/dev/shm) is exhausted; num_workers: 0 needs none, a container needs a larger --shm-size",
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
        TIMED_OUT,
    ),
    (
        r"Connection (closed by peer|reset by peer|was likely closed)|Broken pipe|ncclSystemError|"
        r"Software caused connection abort|client socket has (timed out|failed to connect to any)",
        LOST_CONNECTION,
    ),
    (r"EADDRINUSE|[Aa]ddress already in use", "master_port is in use by another process; unset, a free one is chosen"),
    (
        r"unhandled cuda error|device-side assert|CUDA error",
        "a GPU reported an error; CUDA_LAUNCH_BLOCKING=1 shows the operation",
    ),
)  # fmt: skip


def cause_in_words(text: str) -> str | None:
    """The likely cause behind the end of a log or a traceback; None if no known pattern is in it."""
    tail = "\n".join(text.splitlines()[-30:])
    return next((words for pattern, words in CAUSES if re.search(pattern, tail, re.MULTILINE)), None)


def death_in_words(code: int | None, out_of_memory: bool = False) -> str:
    """How a process ended. code: minus a signal's number, or an exit code. out_of_memory: the kernel ran out of it."""
    if code is None:
        return "ended, and its exit code is not known"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"ended with code {code} without a message"
    reason = OUT_OF_MEMORY if out_of_memory and number == signal.SIGKILL else SIGNALS_IN_WORDS.get(number)
    return f"was ended by {number.name}" + (f": {reason}" if reason else "")
