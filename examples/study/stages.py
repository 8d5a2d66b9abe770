"""The study's stages: prepare what is frozen, choose the weights, compare, choose the layers, compare again."""

import csv
import json
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from otalign import speech

from .adapting import Arm, Recordings, Run, text_error, train
from .design import Design
from .frozen import character_error, encoder_states, train_encoder, train_language_model
from .models import language_model
from .voices import Speak, Voice, synthesise
from .world import TASKS, sentences

Rows = list[dict[str, Any]]


@dataclass
class Bench:
    """The models and the recordings that every run uses."""

    model: LlamaForCausalLM
    training: Recordings
    tests: dict[str, list[Recordings]]  # by split
    facts: dict[str, Any]  # errors of what is frozen


def prepare(design: Design, work: Path, workers: int, speak: Speak = synthesise) -> Path:
    """Synthesise the speech, train the language model and the encoder, and write a `Bench`, unless the file exists."""
    file = work / "bench.pt"
    if file.exists() and json.loads((work / "design.json").read_text()) == repr(design):
        return file
    work.mkdir(parents=True, exist_ok=True)
    texts = sentences(design.language_model_texts, seed=0)
    seen = frozenset(texts)
    development = sentences(design.development_texts, seed=1, avoid=seen)
    test = sentences(design.test_texts, seed=2, avoid=seen | set(development))

    with _pool(workers) as pool:
        future = pool.submit(_trained_weights, texts, design.language_model_steps)

        def recorded(voice: Voice, said: Iterable[str]) -> list[tuple[torch.Tensor, str]]:
            return [(speak(voice, text), text) for text in tqdm(list(said), desc=str(voice), leave=False)]

        generator, heard = torch.Generator().manual_seed(0), []
        for number, voice in enumerate(design.encoder_voices):
            for text in texts[number * design.encoder_texts :][: design.encoder_texts]:
                speed = 0.8 * 2 ** float(torch.rand((), generator=generator))
                heard.append((speak(replace(voice, speed=speed), text), text))
        encoder = train_encoder(heard, design.encoder_steps)

        facts: dict[str, Any] = {"character_error": {}}

        def encoded(voice: Voice, said: list[str]) -> Recordings:
            states = encoder_states(encoder, [mel for mel, _ in recorded(voice, said)])
            facts["character_error"][str(voice)] = character_error(encoder, states, said)
            return Recordings(str(voice), states, list(said))

        training = encoded(design.adapter_voice, texts[-design.adapter_texts :])
        tests = {
            "development": [encoded(voice, development) for voice in design.development_voices],
            "test": [encoded(voice, test) for voice in design.test_voices],
        }
        weights = future.result()
    model = _language_model(weights)
    facts["text_error"] = {task: text_error(model, task, test) for task in TASKS}
    bench = {"model": weights, "training": training, "tests": tests, "facts": facts}
    torch.save(bench, file)
    (work / "design.json").write_text(json.dumps(repr(design)))
    return file


def load(file: Path) -> Bench:
    bench = torch.load(file, weights_only=False)
    return Bench(_language_model(bench.pop("model")), **bench)


def _trained_weights(texts: list[str], steps: int) -> dict[str, torch.Tensor]:
    return train_language_model(texts, steps).state_dict()


def _language_model(weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = language_model().requires_grad_(False).eval()
    model.load_state_dict(weights)
    return model


_bench: Bench  # of a worker


def _start(file: Path | None) -> None:
    global _bench
    torch.set_num_threads(1)  # the tensors are small, and other runs use the other cores
    if file is not None:
        _bench = load(file)


def _run(arm: Arm, seed: int, splits: tuple[str, ...], checkpoints: tuple[int, ...]) -> Run:
    return train(_bench.model, _bench.training, {s: _bench.tests[s] for s in splits}, arm, seed, checkpoints)


@contextmanager
def _pool(workers: int, file: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(file,)) as pool:
        yield pool


def study(design: Design, work: Path, results: Path, workers: int, speak: Speak = synthesise) -> None:
    """All stages; writes errors.csv, layers.csv and facts.json to `results`."""
    _start(None)
    file = prepare(design, work, workers, speak)
    facts = load(file).facts
    errors: Rows = []
    layers: Rows = []
    with _pool(workers, file) as pool:

        def compare(arms: Iterable[Arm], seeds: Iterable[int], splits: tuple[str, ...], stage: str) -> None:
            checkpoints = design.checkpoints if stage == "compare" else design.checkpoints[-1:]
            jobs = [pool.submit(_run, arm, seed, splits, checkpoints) for seed in seeds for arm in arms]
            for job in tqdm(jobs, desc=stage):
                run = job.result()
                errors.extend({"stage": stage, **row} for row in run.errors)
                layers.extend({"stage": stage, **row} for row in run.layers)

        compare(design.choosing(), design.choosing_seeds, ("development",), "choose")
        otreg = best(errors, [arm for arm in design.choosing() if arm.method == "otreg"])
        aista = best(errors, [arm for arm in design.choosing() if arm.method == "aista"])

        compare([Arm(), otreg], design.seeds, ("development", "test"), "compare")
        mrr = retrieval_by_layer(layers)
        chosen = tuple(sorted(speech.select_layers(mrr, design.chosen_layers)))
        with_first = tuple(sorted(speech.select_layers(mrr, design.chosen_layers, always=(0,))))
        sets = list(dict.fromkeys([*design.layer_sets, chosen, with_first]))
        compare([replace(aista, layers=s) for s in sets], design.layer_seeds, ("test",), "layers")
    facts |= {
        "otreg": str(otreg),
        "aista_weight": aista.weight,
        "chosen_layers": chosen,
        "chosen_layers_with_0": with_first,
        "seeds": len(design.seeds),
        "torch": torch.__version__,
    }
    results.mkdir(parents=True, exist_ok=True)
    write(results / "errors.csv", errors)
    write(results / "layers.csv", layers)
    (results / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def best(errors: Rows, arms: list[Arm]) -> Arm:
    """The arm with the smallest word error of the trained task on the development voices."""

    def error(arm: Arm) -> float:
        return statistics.fmean(
            row["repeat_error"] for row in errors if row["stage"] == "choose" and row["arm"] == str(arm)
        )

    return min(arms, key=error)


def retrieval_by_layer(layers: Rows) -> dict[int, float]:
    """Mean reciprocal rank on the development voices, of the adapters that were trained without a regulariser."""
    rows = [row for row in layers if row["split"] == "development" and row["arm"] == str(Arm())]
    numbers = sorted({row["layer"] for row in rows})
    return {n: statistics.fmean(row["mrr"] for row in rows if row["layer"] == n) for n in numbers}


def write(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
