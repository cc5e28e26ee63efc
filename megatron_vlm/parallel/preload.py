"""Imported once by the fork server of `pool.py`: every process of every pool starts with Megatron in memory."""

import gc
import os

from megatron_vlm.parallel import cpu

cpu.enable(os.environ.get("VLM_POOL_DEVICE", "cpu"))  # pool.py sets it

import megatron.core.dist_checkpointing  # noqa: E402, F401
import megatron.core.distributed  # noqa: E402, F401
import megatron.core.models.gpt  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import megatron.core.pipeline_parallel  # noqa: E402, F401

import megatron_vlm.parallel.groups  # noqa: E402, F401

# Megatron calls gc.collect() in every save and load; without this it walks all objects of the imports each time.
gc.freeze()
