"""The study of examples/study: its parts, compared with hand-computed results and SciPy, and all stages in small, on tones."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from examples.demo.speech import SAMPLE_RATE, log_mel
from examples.study import adapting, report, stages, stats, world
from examples.study.adapting import Arm, Recordings
from examples.study.design import tiny
from examples.study.models import STRIDE, WIDTH, Adapter, Encoder, language_model
from examples.study.voices import Voice


@pytest.fixture
def model():
    torch.manual_seed(0)
    return language_model().requires_grad_(False).eval()


def spelled(texts: list[str], frames: int = 10) -> Recordings:
    """Recordings in which every word is its own code for some frames, with noise."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(len(world.VOCABULARY), WIDTH, generator=generator)
    states = [codes[world.encode(text)].repeat_interleave(frames, 0) for text in texts]
    return Recordings("codes", [s + 0.3 * torch.randn(s.shape, generator=generator) for s in states], texts)


def test_tasks_and_tokens():
    sentence = "the red dog never sees one king"
    assert world.answer(sentence, "repeat") == sentence
    assert world.answer(sentence, "reverse") == "king one sees never dog red the"
    assert world.answer(sentence, "object") == "king"
    assert world.decode([*world.encode(sentence), world.EOS, 9, 9]) == sentence
    assert world.decode([world.PAD, *world.encode("dog"), world.PAD]) == "dog"
    stuttered = world.stutter(world.encode(sentence), torch.Generator().manual_seed(0))
    assert len(stuttered) > len(world.encode(sentence))
    spoken = [token for token in stuttered if token != world.PAUSE]
    assert torch.tensor(spoken).unique_consecutive().tolist() == world.encode(sentence)


def test_sentences_are_different_and_apart():
    seen = world.sentences(200, seed=0)
    assert seen == world.sentences(200, seed=0)
    fresh = world.sentences(200, seed=0, avoid=frozenset(seen))
    assert len({*seen, *fresh}) == 400
    assert {len(s.split()) for s in seen} == {5, 6, 7, 8}


def test_paired_differences():
    before, after = [0.5, 0.4, 0.6, 0.3, 0.5], [0.3, 0.4, 0.1, 0.2, 0.6]
    found = stats.paired(before, after)
    interval = scipy.stats.ttest_rel(after, before).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.below, found.ties, found.seeds) == (3, 1, 5)
    assert found.p == pytest.approx(0.625)  # 3 or more of 4, or 1 or fewer, by a fair coin: 2 (4 + 1) / 16
    assert stats.paired([1] * 8, [0] * 8).p == pytest.approx(2 / 256)
    with pytest.raises(ValueError, match="the same length"):
        stats.paired([1, 2], [1])


def test_correlation_draws_whole_groups():
    generator = np.random.default_rng(0)
    x = generator.normal(size=12)
    y = x + generator.normal(size=12)
    found = stats.correlation(x, y, list(range(12)))
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.low < found.r_squared < found.high
    # Copies of a point add no evidence if they belong to one group.
    copies = stats.correlation(np.repeat(x, 20), np.repeat(y, 20), np.repeat(np.arange(12), 20).tolist())
    assert copies.r_squared == pytest.approx(found.r_squared)
    assert (copies.low, copies.high) == pytest.approx((found.low, found.high))
    assert math.isnan(stats.correlation(x, np.ones(12), list(range(12))).r_squared)


@torch.no_grad()
@pytest.mark.parametrize("build, width", [(Encoder, 80), (Adapter, WIDTH)])
def test_padding_does_not_change_the_models(build, width):
    torch.manual_seed(0)
    network = build().eval()
    lengths = torch.tensor([41, 8, 25])
    x = torch.randn(3, 41, width)
    out, out_lengths = network(x, lengths)
    stride = STRIDE if build is Encoder else 4
    assert out_lengths.tolist() == [math.ceil(n / stride) for n in lengths.tolist()]
    for row, states, n, size in zip(x, out, lengths.tolist(), out_lengths.tolist(), strict=True):
        alone, _ = network(row[None, :n], torch.tensor([n]))
        torch.testing.assert_close(states[:size], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_items_do_not_change_the_answers(model):
    embedded, lengths = torch.randn(4, 12, WIDTH), torch.tensor([12, 3, 7, 9])
    texts = world.sentences(4, seed=3)
    for task in world.TASKS:
        together = adapting.word_error(model, embedded, lengths, task, texts)
        words = [len(world.answer(text, task).split()) for text in texts]
        alone = [
            adapting.word_error(model, embedded[k : k + 1, : lengths[k]], lengths[k : k + 1], task, texts[k : k + 1])
            for k in range(4)
        ]
        assert together == pytest.approx(np.average(alone, weights=words), abs=1e-5)
    inputs, labels = adapting.assemble(model, embedded, lengths, "object", [[5], [6, 7], [], [8]])
    assert inputs.shape == (4, 15, WIDTH)
    assert labels[1].tolist() == [-100] * 5 + [6, 7] + [-100] * 8
    assert labels[0].tolist() == [-100] * 14 + [5]


def test_arms_differ_only_in_the_regulariser(model):
    """With weight zero every arm equals the arm without a regulariser: same start, same batches."""
    data = spelled(world.sentences(8, seed=0))
    runs = [
        adapting.train(model, data, {"test": [data]}, arm, seed=5, checkpoints=(3,), batch=4)
        for arm in (Arm(), Arm("otreg", 0.0), Arm("aista", 0.0, (0, 2)), Arm("otreg", 5.0))
    ]
    none, *zero, strong = [{k: v for k, v in run.errors[0].items() if k != "arm"} for run in runs]
    for run in zero:
        assert run == pytest.approx(none)
    assert strong["aps_cosine"] != none["aps_cosine"]


@pytest.mark.slow
def test_regularisers_close_the_gap(model):
    """The losses must reduce the gap. Whether the errors fall too is the question of the study."""
    data = spelled(world.sentences(16, seed=0))
    arms = Arm(), Arm("otreg", 10.0), Arm("aista", 10.0, (0, 1))
    runs = [adapting.train(model, data, {"test": [data]}, arm, seed=0, checkpoints=(60,), batch=8) for arm in arms]
    none, *pulled = ({**run.errors[0], "embeddings": run.layers[0]["sequence_cosine"]} for run in runs)
    for scores in pulled:
        assert scores["words_found"] > none["words_found"] + 0.2
        assert scores["aps_cosine"] > none["aps_cosine"] + 0.02
        assert scores["embeddings"] > none["embeddings"] + 0.1


def tones(voice: Voice, text: str) -> Tensor:
    """A tone for each letter; each voice has its own register."""
    register = 1 + 0.1 * (len(str(voice)) % 5)
    time = torch.arange(int(0.06 / voice.speed * SAMPLE_RATE)) / SAMPLE_RATE
    pitches = [0 if c == " " else 200 + 120 * (ord(c) - ord("a")) for c in text]
    return log_mel(torch.cat([torch.sin(2 * math.pi * register * p * time) for p in pitches]) + 1e-3)


@pytest.mark.slow
def test_all_stages_in_miniature(tmp_path):
    design, results = tiny(), tmp_path / "page"
    stages.study(design, tmp_path / "work", results, workers=2, speak=tones)
    errors, layers = report.read(results / "errors.csv"), report.read(results / "layers.csv")
    trained = report.select(errors, stage="compare", split="test")
    assert len(trained) == 2 * len(design.seeds) * len(design.checkpoints) * len(design.test_voices)
    assert {row["layer"] for row in layers} == {0, 1, 2, 3, 4}
    assert all(math.isfinite(value) for row in errors + layers for value in row.values() if isinstance(value, float))

    page = tmp_path / "page.md"
    names = ("frozen", "weights", "otreg", "aps", "layers", "aista")
    page.write_text("# Study\n" + "".join(f"<!-- study:{n} -->\n<!-- /study:{n} -->\n" for n in names))
    report.report(results, page)
    text = page.read_text()
    assert text.count("| --- |") >= len(names)
    assert "nan" not in text
    assert sorted(p.name for p in results.glob("*.png")) == ["gap.png", "layers.png", "voices.png"]
    report.report(results, page)
    assert page.read_text() == text

    # Frozen parts are computed once, and again for another design.
    file = tmp_path / "work" / "bench.pt"
    made = file.stat().st_mtime_ns
    assert stages.prepare(design, tmp_path / "work", 2, tones) == file
    assert file.stat().st_mtime_ns == made
