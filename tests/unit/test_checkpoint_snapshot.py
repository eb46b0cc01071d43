"""The copy of a rank's state in host memory that an asynchronous save writes."""

import pytest
import torch

from megatron.checkpoint.chunks import LocalChunks
from megatron.checkpoint.snapshot import Snapshot
from tests.operations import Operations


def state_on(device: torch.device) -> tuple[dict[str, LocalChunks], list[torch.Tensor]]:
    """Chunks of two tensors, and the tensors: all of one in fp32, and the first two rows of a bf16 one of three."""
    whole, rows = torch.randn(5, device=device), torch.randn(3, 4, device=device).bfloat16()
    state = {"whole": LocalChunks([5]), "rows": LocalChunks([4, 4])}
    state["whole"].chunks = {torch.Size([0]): whole}
    state["rows"].chunks = {torch.Size([1, 0]): rows[:2]}
    return state, [whole, rows]


def chunks_in(state: dict[str, LocalChunks]) -> list[torch.Tensor]:
    return [chunk for local in state.values() for chunk in local.chunks.values()]


def test_each_save_copies_each_chunk_once_into_the_same_memory_and_reads_nothing():
    state, tensors = state_on(torch.device("cpu"))
    snapshot = Snapshot(state, torch.device("cpu"))
    places = [chunk.data_ptr() for chunk in chunks_in(snapshot.chunks)]
    for number in range(2):
        tensors[0].fill_(number)
        before = [chunk.clone() for chunk in chunks_in(state)]
        with Operations() as operations:
            snapshot.fill(state)
        assert operations.count == {"aten::copy_": len(before)}
        tensors[0].fill_(-1.0)
        snapshot.wait()
        assert all(map(torch.equal, chunks_in(snapshot.chunks), before))
        assert [chunk.data_ptr() for chunk in chunks_in(snapshot.chunks)] == places


def test_the_writer_need_not_copy_a_chunk_again():
    """torch's writer clones a tensor whose storage is larger than itself."""
    state, _ = state_on(torch.device("cpu"))
    chunks = chunks_in(Snapshot(state, torch.device("cpu")).chunks)
    assert [chunk.untyped_storage().nbytes() for chunk in chunks] == [chunk.nbytes for chunk in chunks]
    assert [chunk.shape for chunk in chunks] == [(5,), (2, 4)] and chunks[1].dtype == torch.bfloat16


def test_the_memory_lives_as_long_as_a_chunk_and_is_no_more_than_the_state_and_its_alignment():
    state, _ = state_on(torch.device("cpu"))
    snapshot = Snapshot(state, torch.device("cpu"))
    assert snapshot.bytes == 2 * 64
    snapshot.fill(state)
    [chunk, _] = chunks_in(snapshot.chunks)
    del snapshot
    assert torch.equal(chunk, chunks_in(state)[0])


@pytest.mark.gpu
def test_on_a_gpu_a_save_queues_copies_to_pinned_memory_and_waits_for_none():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    state, tensors = state_on(device)
    snapshot = Snapshot(state, device)
    assert all(chunk.is_pinned() for chunk in chunks_in(snapshot.chunks))
    before = [chunk.cpu() for chunk in chunks_in(state)]
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second, in which a copy that waited would be seen
    started = torch.cuda.Event()
    started.record()
    with Operations() as operations:
        torch.cuda.set_sync_debug_mode("error")
        try:
            snapshot.fill(state)
            for tensor in tensors:
                tensor.fill_(-1.0)  # the next step, queued behind the copies
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not started.query(), "the copies were queued while the device was busy"
    assert operations.count["aten::copy_"] == len(before)
    snapshot.wait()
    assert all(map(torch.equal, chunks_in(snapshot.chunks), before))
