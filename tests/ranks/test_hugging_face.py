"""A published model is loaded under any layout, and its weights come together again, bit by bit."""

import pytest
import torch
import torch.distributed as dist

from megatron.config.parameter_shapes import ALL_BUT_ADAPTERS, is_adapter, trains
from megatron.config.plan import LoraPlan, Plan
from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError
from megatron.hugging_face.published import load_published, open_published
from megatron.model.gpt import gpt_layers
from megatron.training.export import GatheredWeights
from tests import tiny
from tests.ranks.run import run_ranks

LAYOUTS = {
    "tensor-parallel": {"tensor": 2},
    "pipeline": {"pipe": 2},
    "ZeRO 1, bf16": {"data": 2, "zero": 1, "precision": "bf16"},
    "ZeRO 3": {"data": 2, "zero": 3},
    "frozen, bf16": {"tensor": 2, "precision": "bf16", "engine": {"freeze": ("mlp",)}},
    "adapters": {"tensor": 2, "engine": {"freeze": (ALL_BUT_ADAPTERS,)}},
}


def load_and_gather(folder: str) -> None:
    published = open_published(folder)
    for name, layout in LAYOUTS.items():
        lora = LoraPlan(2, 4.0, 0.0, ("query", "down")) if name == "adapters" else None
        plan: Plan = tiny.plan(**layout, model=vars(published.model) | {"padded_vocab_size": 448, "lora": lora})
        grid = start_layout(plan.layout)
        engine = TrainingEngine(gpt_layers(plan.model, grid, None, adapter_seed=1), grid, plan)
        load_published(engine, published)
        assert (engine.base or {}).get("path") == (f"hf:{folder}" if lora else None)
        gathered = GatheredWeights(engine)
        if dist.get_rank() != 0:
            gathered.serve()
            continue
        weights = gathered.weights()
        expected = published.weights()
        assert {each for each in weights if not is_adapter(each)} == set(expected), name
        for parameter, weight in expected.items():
            wanted = weight.read().float()
            if not trains(parameter, plan.engine.freeze) and plan.engine.precision == "bf16":  # kept without a master
                wanted = wanted.bfloat16().float()
            assert torch.equal(weights[parameter].read(), wanted), f"{name}: {parameter}"
        gathered.end(failed=False)


def fail_on_rank_0() -> None:
    plan = tiny.plan(tensor=2)
    grid = start_layout(plan.layout)
    gathered = GatheredWeights(TrainingEngine(gpt_layers(plan.model, grid, seed=1), grid, plan))
    if dist.get_rank() == 0:
        gathered.end(failed=True)
        return
    with pytest.raises(RunError, match="rank 0 could not write save_hf"):
        gathered.serve()


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_weights_of_a_published_model_are_loaded_and_gathered_bit_by_bit_under_any_layout(family, tmp_path):
    from tests.hugging_face_files import write_model  # not in the ranks, which need not import what makes models

    run_ranks(2, load_and_gather, str(write_model(tmp_path / family, family)), timeout=120)


def test_ranks_that_wait_for_an_export_learn_that_it_failed():
    run_ranks(2, fail_on_rank_0)
