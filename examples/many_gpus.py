"""One model on all GPUs of a host, and each layer's matrices cut between them.

torchrun --nproc-per-node gpu examples/many_gpus.py MODEL
torchrun --nproc-per-node 2 examples/many_gpus.py MODEL --cpu   # to try it without a GPU
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed

import weightctl


def main() -> None:
    """Load the whole model on every rank, then of its matrices only this rank's rows."""
    if "--cpu" in sys.argv:
        device = "cpu"
        distributed.init_process_group("gloo")
    else:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl")
    group = distributed.group.WORLD
    whole = weightctl.load(sys.argv[1], device, process_group=group)
    matrices = dict.fromkeys((name for name, tensor in whole.items() if tensor.ndim > 1), 0)
    part = weightctl.load(sys.argv[1], device, process_group=group, plan=matrices)
    print(f"rank {distributed.get_rank()}: {size(whole):.1f} MB on {device}, {size(part):.1f} MB cut", flush=True)
    distributed.destroy_process_group()


def size(tensors: dict[str, torch.Tensor]) -> float:
    """MB."""
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


if __name__ == "__main__":
    main()
