"""The study's design: which voices play which part, and how much of everything there is."""

from dataclasses import dataclass, replace

from .adapting import Arm
from .voices import Voice

TRAINING_VOICE = Voice("espeak-ng", "en-us")


@dataclass(frozen=True)
class Design:
    """Voices, sizes and arms. `tiny` is for the tests."""

    # The encoder knows these seven, at speeds from 0.8 to 1.6.
    encoder_voices: tuple[Voice, ...] = (
        TRAINING_VOICE,
        Voice("espeak-ng", "en-gb+f2"),
        Voice("espeak-ng", "en-gb-scotland+m3"),
        Voice("espeak-ng", "en-us+f4"),
        Voice("espeak-ng", "en-gb-x-rp+m7"),
        Voice("flite", "slt"),
        Voice("flite", "kal16"),
    )
    adapter_voice: Voice = TRAINING_VOICE
    # Weights and layers are chosen on these: one that the encoder knows, one that it does not, and a fast one.
    development_voices: tuple[Voice, ...] = (
        Voice("espeak-ng", "en-us+f4"),
        Voice("espeak-ng", "en-gb-x-gbclan+f3"),
        Voice("espeak-ng", "en-us+f4", 1.5),
    )
    # Reported on these, sorted as the tables show them: known to the encoder, new to it, and fast or slow.
    known_voices: tuple[Voice, ...] = (
        Voice("espeak-ng", "en-gb+f2"),
        Voice("espeak-ng", "en-gb-scotland+m3"),
        Voice("flite", "slt"),
        Voice("flite", "kal16"),
    )
    new_voices: tuple[Voice, ...] = (
        Voice("espeak-ng", "en-029+m5"),
        Voice("espeak-ng", "en-us-nyc+f5"),
        Voice("flite", "awb"),
        Voice("flite", "rms"),
    )
    speeds: tuple[Voice, ...] = (
        replace(TRAINING_VOICE, speed=1.3),
        replace(TRAINING_VOICE, speed=1.6),
        replace(TRAINING_VOICE, speed=0.8),
    )

    language_model_texts: int = 6000
    language_model_steps: int = 1200
    encoder_texts: int = 300  # for each voice
    encoder_steps: int = 800
    adapter_texts: int = 800
    development_texts: int = 50
    test_texts: int = 50

    checkpoints: tuple[int, ...] = (125, 250, 500)  # steps of an adapter at which it is measured
    weights: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    choosing_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(8))
    layer_seeds: tuple[int, ...] = tuple(range(6))  # for AI-STA's layers
    layer_sets: tuple[tuple[int, ...], ...] = ((0,), (0, 1), (0, 1, 2, 3, 4), (1,), (3,))
    chosen_layers: int = 2  # how many retrieval chooses

    @property
    def test_voices(self) -> tuple[Voice, ...]:
        return self.known_voices + self.new_voices + self.speeds

    def choosing(self) -> list[Arm]:
        """The arms among which the weights are chosen."""
        return [
            *(Arm("otreg", weight) for weight in self.weights),
            *(Arm("aista", weight, (0, 1)) for weight in self.weights),
        ]


def tiny() -> Design:
    """The same stages in seconds, for the tests."""
    full = Design()
    return replace(
        full,
        encoder_voices=full.encoder_voices[:2],
        development_voices=full.development_voices[:1],
        known_voices=full.known_voices[:1],
        new_voices=full.new_voices[:1],
        speeds=full.speeds[:1],
        language_model_texts=50,
        language_model_steps=4,
        encoder_texts=4,
        encoder_steps=4,
        adapter_texts=10,
        development_texts=4,
        test_texts=4,
        checkpoints=(2, 4),
        weights=(1.0,),
        choosing_seeds=(100,),
        seeds=(0, 1),
        layer_seeds=(0, 1),
        layer_sets=((0,), (0, 1)),
    )
