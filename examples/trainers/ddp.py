"""OTReg on several processes: `torchrun --nproc-per-node 2 examples/trainers/ddp.py` (gloo on CPUs, NCCL on GPUs)."""

import argparse

import torch
import torch.distributed as dist
from tiny_slm import Recordings, collate, tiny_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import otalign


def main(steps: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_num_threads(1)
    model = tiny_model()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        model.cuda()
    # Before the model is wrapped; means are over the items of all processes.
    handle = otalign.attach(model, otalign.speech.OTRegLoss(warmup_steps=5), weight=1.0, accumulate="mean")
    parallel = DistributedDataParallel(model)

    device = next(model.parameters()).device
    data = Recordings()
    batches = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True), collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        loss = parallel(**{key: value.to(device) for key, value in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0:
            metrics = handle.metrics(synchronise=True)
            if dist.get_rank() == 0:
                print(step, f"loss {loss.item():.3f}", {key: round(value, 4) for key, value in metrics.items()})
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    first = weights.clone()
    dist.broadcast(first, 0)
    assert torch.equal(weights, first), "the processes have to keep the same weights"
    dist.barrier()  # gloo's threads release their last tensors before the group is destroyed
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    main(parser.parse_args().steps)
