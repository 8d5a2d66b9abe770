"""Checks, under torchrun, that several processes have the gradients of one process with the joined batch.

Run by tests/integrations/test_distributed.py.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import otalign
from otalign.speech import InnerAlignmentLoss, OTRegLoss

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.speech_models import CASES

ROWS, PLACEHOLDER, WORDS = 3, 19, 4


class Model(nn.Module):
    """A speech language model with the interface of Hugging Face, whose batches can be joined."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"audio_token_id": PLACEHOLDER})()
        self.embed, self.adapter = nn.Embedding(20, 8), nn.Linear(5, 8)
        self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 20)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor, features: Tensor, labels: Tensor, output_hidden_states=None, **_) -> dict:
        speech = self.adapter(features)
        hidden = torch.where((input_ids == PLACEHOLDER)[..., None], speech, self.embed(input_ids))
        states = hidden, self.block(hidden).tanh()
        # As in training with one normaliser for all ranks, so that only the mean of the alignment loss is tested.
        loss = nn.functional.cross_entropy(self.head(states[1]).flatten(0, 1), labels.flatten(), reduction="sum") / 100
        return {"loss": loss, "hidden_states": states if output_hidden_states else None}


def batch(rank: int, empty: bool) -> dict[str, Tensor]:
    """The rows of a rank, of different lengths; all without speech if `empty`."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 18, (ROWS, 12), generator=generator)
    for row in range(ROWS):
        frames = 0 if empty else int(torch.randint(2, 9, (), generator=generator)) * (row != rank % 2)
        ids[row, :frames] = PLACEHOLDER
    labels = torch.full_like(ids, -100)
    labels[:, -WORDS:] = ids[:, -WORDS:]
    return {"input_ids": ids, "features": torch.randn(ROWS, 12, 5, generator=generator), "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = gradient.clone()
    return found


def attached(model: nn.Module, accumulate: str) -> otalign.integrations.Attachment:
    return otalign.attach(model, OTRegLoss(), 2.0, accumulate=accumulate)


def check(start: Model, wrap: str, accumulate: str, empty_rank: int | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = [batch(r, r == empty_rank) for r in range(world)]

    model = copy.deepcopy(start)
    handle = attached(model, accumulate)
    if wrap == "ddp":
        parallel: nn.Module = DistributedDataParallel(model)
    else:
        fully_shard(model.block)
        parallel = fully_shard(model)
    parallel(**batches[rank])["loss"].backward()
    found, metrics = gradients(parallel), handle.metrics(synchronise=True)

    joined = copy.deepcopy(start)
    single = attached(joined, accumulate)
    together = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    with mock.patch.object(otalign.distributed, "processes", lambda: 1):
        both = joined(**together)["loss"]
    own = joined.eval()(**together)["loss"]
    # The model losses of the ranks are parts of a sum, and DDP averages them.
    (both - own + own / world).backward()
    expected, single_metrics = gradients(joined), single.metrics()

    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert metrics.keys() == single_metrics.keys()
    for key, value in single_metrics.items():
        assert abs(metrics[key] - value) <= 1e-5 * max(1, abs(value)), (key, metrics, single_metrics)


def check_language_model(wrap: str) -> None:
    """Qwen2-Audio, whose pass over the text runs inside the wrapped forward. All ranks have the same batch and its gradients."""
    case, other = CASES["qwen2_audio"](), CASES["qwen2_audio"]()
    criterion = InnerAlignmentLoss([0, 2])
    otalign.attach(other.model, criterion)
    other.model(**other.batch).loss.backward()
    expected = gradients(other.model)

    otalign.attach(case.model, criterion)
    parallel: nn.Module
    if wrap == "ddp":
        parallel = DistributedDataParallel(case.model, find_unused_parameters=True)
    else:
        for layer in case.model.model.language_model.layers:
            fully_shard(layer)
        parallel = fully_shard(case.model)
    parallel(**case.batch).loss.backward()
    found = gradients(parallel)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def check_a_rank_that_lacks_something() -> None:
    """A rank without labels, or without transcripts, joins the collectives that the other ranks wait for."""
    rank, handles = dist.get_rank(), []
    case = CASES["qwen2_audio"]()
    handles.append(otalign.attach(case.model, OTRegLoss(), accumulate="mean", on_missing="ignore"))
    parallel: nn.Module = DistributedDataParallel(case.model, find_unused_parameters=True)
    own = {key: value for key, value in case.batch.items() if key != "labels" or rank == 0}
    output = parallel(**own)
    (output.loss if rank == 0 else 0 * output.logits.sum()).backward()

    case = CASES["qwen2_audio"]()
    options = {"transcript": "transcript_ids", "on_missing": "ignore"}
    handles.append(otalign.attach(case.model, InnerAlignmentLoss([0, 2]), **options))
    for layer in case.model.model.language_model.layers:
        fully_shard(layer)
    more = {"transcript_ids": case.batch["labels"]} if rank == 0 else {}
    fully_shard(case.model)(**case.batch, **more).loss.backward()
    for handle in handles:
        assert bool(handle.metrics()) == (rank == 0)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = Model()
    for wrap in ("ddp", "fsdp2"):
        for accumulate in ("mean", "tokens"):
            for empty_rank in (None, 0, dist.get_world_size() - 1):
                check(start, wrap, accumulate, empty_rank)
        check_language_model(wrap)
    check_a_rank_that_lacks_something()
    dist.barrier()
    if dist.get_rank() == 0:
        print("all equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skips the shutdown of the interpreter: threads of torch that wake up during it sometimes abort the process.
    sys.stderr.flush()
    os._exit(0)
