"""Two tensor-parallel ranks, each with its packed shard, have the logits of one rank."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron.engine.distributed import start
from tests.ranks.run import run_ranks
from tests.trained import trained_model


def save_logits(out: str, tensor: int, pack: bool) -> None:
    model = trained_model(start(tensor=tensor), num_kv_heads=2)
    if pack:
        model.engine.pack_weights()
    found = model.logits(torch.arange(1, 33).view(2, 16))
    if dist.get_rank() == 0:
        torch.save(found, out)


def test_packed_shards_give_the_logits_of_one_rank(tmp_path: Path):
    paths = [str(tmp_path / name) for name in ("one", "two")]
    run_ranks(1, save_logits, paths[0], 1, False)
    run_ranks(2, save_logits, paths[1], 2, True)
    one, two = map(torch.load, paths)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4 * one.abs().max().item())
