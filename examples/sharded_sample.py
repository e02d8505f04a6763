"""One noise on any number of processes: a Bayesian layer whose weights are sharded.

    torchrun --nproc-per-node 1 examples/sharded_sample.py
    torchrun --nproc-per-node 4 examples/sharded_sample.py

Every process holds a part of the means and deviations of the weights, and samples its part
alone. The weights, the loss and the gradients are those of a single process, whatever the
number of processes: the digests that are printed stay the same.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from reparam_fused import fused_reparameterize, key, noise


def digest(t: Any) -> str:
    """Of the bits of a whole DTensor."""
    return hashlib.sha256(t.full_tensor().detach().cpu().numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        shape = (1001, 512)
        weights = noise(key(0, device=device), shape).mul_(0.05)  # the same on every process
        mu: Any = distribute_tensor(weights, mesh, [Shard(0)]).requires_grad_()
        std = distribute_tensor(torch.full_like(weights, 0.1), mesh, [Shard(0)]).requires_grad_()

        # With a key: the same weights for any number of processes
        w: Any = fused_reparameterize(mu, std=std, key=key(42, device=device))
        w.square().sum().backward()
        # Without one: the first process draws it for all
        torch.manual_seed(7 + dist.get_rank())
        drawn = fused_reparameterize(mu, std=std)

        results = {"weights": w, "grad of mu": mu.grad, "grad of std": std.grad, "drawn": drawn}
        digests = [f"{name:12} {digest(t)}" for name, t in results.items()]
        if dist.get_rank() == 0:
            print(f"{mesh.size()} processes on {device.type}, {w.to_local().shape[0]} rows here")
            print(*digests, sep="\n")
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
