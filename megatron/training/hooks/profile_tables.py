"""Tables of a profile: the ten kernels with the most time, the ten operators with the most memory."""

from collections import Counter
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

ROWS = 10
LONGEST_NAME = 120  # of a kernel; templates make them longer
# Operators that only allocate: their memory counts for the operator that called them.
_ALLOCATORS = ("aten::empty", "aten::new_empty", "aten::resize", "aten::zeros", "aten::new_zeros", "aten::full")


def kernel_table(profiler: profile, on_gpu: bool) -> str:
    """The kernels with the most time on the GPU; on a CPU, the operators with the most self CPU time."""
    found: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        if event.is_user_annotation or (event.device_type != DeviceType.CPU) != on_gpu:
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((time / 1000, event.count, event.key))
    if on_gpu and not found:
        why = "the profiler saw no kernel: the driver may be set to let administrators only (RmProfilingAdminOnly)"
        return f"{why}; {kernel_table(profiler, on_gpu=False)}"
    whole = sum(time for time, _, _ in found) or 1.0
    kind, where = ("kernels", "on the GPU") if on_gpu else ("operators", "on the CPU, without what they call")
    lines = [f"the {ROWS} most expensive of {len(found)} {kind}, by time {where}; {whole:,.1f} ms in all"]
    lines.append(f"{'share':>7} {'total ms':>12} {'calls':>9} {'mean ms':>10}  {kind[:-1]}")
    for time, calls, name in sorted(found, reverse=True)[:ROWS]:
        lines.append(f"{time / whole:7.1%} {time:12,.3f} {calls:9,} {time / calls:10,.4f}  {name[:LONGEST_NAME]}")
    return "\n".join(lines)


def memory_table(profiler: profile) -> str:
    """The operators that allocated the most host memory, and the peak of all of them."""
    allocated: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events() or []:
        size = event.self_cpu_memory_usage
        if size > 0 and not event.is_user_annotation:
            name = _owner(event)
            allocated[name] += size
            calls[name] += 1
    whole = sum(allocated.values()) or 1
    lines = [f"on a CPU torch takes no snapshot; the {ROWS} of {len(allocated)} operators that allocated most instead"]
    lines.append(f"(at most {peak_bytes(profiler) / 1e6:,.1f} MB above what was there before the first of these steps)")
    lines.append(f"{'share':>7} {'total MB':>12} {'calls':>9}  operator")
    for name, size in allocated.most_common(ROWS):
        lines.append(f"{size / whole:7.1%} {size / 1e6:12,.3f} {calls[name]:9,}  {name[:LONGEST_NAME]}")
    return "\n".join(lines)


def peak_bytes(profiler: profile) -> int:
    """Peak of allocated bytes above those at the start of the profiler. Needs `profile_memory`."""
    now = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _owner(event: Any) -> str:
    while event.name.startswith(_ALLOCATORS) and event.cpu_parent is not None:
        event = event.cpu_parent
    return str(event.name)
