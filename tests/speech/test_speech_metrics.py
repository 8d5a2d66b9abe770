"""Scores over a data set: batch by batch, or from several processes, they equal those of all items at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import otalign
from otalign.speech import RetrievalCorpus, alignment_path_score, retrieval_scores, select_layers, sequence_similarity
from otalign.speech.metrics import AlignmentPathMetric, RetrievalMetric

from ..helpers.problems import close, draw

ITEMS = 12


def data():
    """Speech and text of three layers, with an item that is empty."""
    lengths = [3 + i % 5 for i in range(ITEMS)], [2 + i % 3 for i in range(ITEMS)]
    lengths[0][4] = 0
    batches = [draw(*lengths, D=8, dtype=torch.float32, seed=seed) for seed in range(3)]
    return [b.x for b in batches], [b.y for b in batches], batches[0].x_lengths, batches[0].y_lengths


def part(of, items):
    xs, ys, n, m = of
    return [x[items] for x in xs], [y[items] for y in ys], n[items], m[items]


def check(path: AlignmentPathMetric, retrieval: RetrievalMetric, corpus: RetrievalCorpus) -> None:
    """Compare with all items at once, without the empty one."""
    everything = part(data(), [i for i in range(ITEMS) if i != 4])
    expected, found = alignment_path_score(*everything), path.compute()
    close(found.score, expected.score.double().mean(), 1e-6)
    for name in ("per_layer", "monotonicity", "consistency"):
        close(getattr(found, name), getattr(expected, name).double().mean(1), 1e-6, name)
    close(found.sequence_similarity, sequence_similarity(*everything).double().mean(1), 1e-6)
    for scores in (retrieval.compute(), corpus.compute()):
        for actual, right in zip(scores, retrieval_scores(*everything), strict=True):
            close(actual, right, 1e-6)


def fill(of, *metrics):
    for metric in metrics:
        for items in of:
            metric.update(*part(data(), items))


def test_over_batches():
    metrics = AlignmentPathMetric(layers=3), RetrievalMetric(chunk=5), RetrievalCorpus(chunk=5)
    fill(([0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]), *metrics)
    check(*metrics)
    metrics[0].reset()
    assert metrics[0].compute().score.isnan()


def test_one_layer():
    """torchmetrics squeezes the results of one layer to scalars."""
    retrieval = RetrievalMetric()
    xs, ys, n, m = data()
    retrieval.update(xs[:1], ys[:1], n, m)
    found = retrieval.compute()
    close(found.mrr, retrieval_scores(xs[0], ys[0], n, m).mrr[0], 1e-6)
    assert select_layers(found, 1) == [0]
    with pytest.raises(ValueError, match=r"expected \(L, D\) \[1, 8\] as before"):
        retrieval.update(xs, ys, n, m)


def test_metrics_are_attributes_of_speech():
    assert otalign.speech.metrics.RetrievalMetric is otalign.speech.RetrievalMetric is RetrievalMetric
    with pytest.raises(AttributeError, match="no attribute 'RetrievalMetrics'"):
        otalign.speech.RetrievalMetrics  # noqa: B018


def process(rank: int, world: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    metrics = AlignmentPathMetric(layers=3), RetrievalMetric(), RetrievalCorpus()
    # The processes have different numbers of items and batches. The last has a batch with only the empty item.
    mine = [[[0, 1, 2], [3]], [[4], [5, 6, 7, 8, 9, 10, 11]]][rank]
    fill(mine, *metrics)
    check(*metrics)
    # A process without any batch.
    metrics = AlignmentPathMetric(layers=3), RetrievalMetric(), RetrievalCorpus()
    fill([[*range(ITEMS)]] if rank == 0 else [], *metrics)
    check(*metrics)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_over_processes(unused_port):
    mp.spawn(process, (2, unused_port), nprocs=2)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_number_of_layers():
    with pytest.raises(ValueError, match="expected 2 layers, got 3"):
        AlignmentPathMetric(layers=2).update(*data())
