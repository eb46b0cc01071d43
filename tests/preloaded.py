"""What the server that processes are forked from imports, so that none of them has to.

An engine imports muon, and with it torch._inductor, when it is made: a second in each process. `gc.freeze` keeps the
garbage collection of a process from touching, and so copying, all that it shares with the server: 0.2 s in each.
"""
# ruff: noqa: F401

import gc

import deepspeed.runtime.zero.muon.muon_optimizer
import pytest
import torch._dynamo
import torch.distributed.device_mesh
import torch.testing

import megatron.checkpoint.store
import megatron.engine.training
import megatron.model.gpt

gc.collect()
gc.freeze()
