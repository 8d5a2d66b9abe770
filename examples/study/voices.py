"""The study's speech, from two synthesisers in Debian: espeak-ng (formants) and flite (diphones and a statistical voice)."""

import functools
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from ..demo.speech import SAMPLE_RATE, log_mel

ESPEAK_WORDS_PER_MINUTE = 175  # espeak-ng's own default


@dataclass(frozen=True)
class Voice:
    """A voice of a synthesiser at a speed; 1 is the synthesiser's own."""

    synthesiser: str
    name: str
    speed: float = 1.0

    def __str__(self) -> str:
        return f"{self.synthesiser} {self.name}" + (f" x{self.speed:g}" if self.speed != 1 else "")


Speak = Callable[[Voice, str], Tensor]  # to log-mel frames


def synthesise(voice: Voice, text: str) -> Tensor:
    """Log-mel frames `(T, MELS)`, 10 ms apart, of a text as `voice` speaks it."""
    if voice.synthesiser == "espeak-ng":
        speed = round(ESPEAK_WORDS_PER_MINUTE * voice.speed)
        sound: io.BytesIO | str = io.BytesIO(_run("espeak-ng", "-v", voice.name, "-s", str(speed), "--stdout", text))
        samples, rate = soundfile.read(sound, dtype="float32")
    else:
        if voice.name not in _flite_voices():  # flite would silently use another voice
            raise RuntimeError(f"flite has no voice {voice.name!r}, only {_flite_voices()}")
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            stretch = f"duration_stretch={1 / voice.speed:.4f}"
            _run("flite", "-voice", voice.name, "--setf", stretch, "-t", text, "-o", file.name)
            samples, rate = soundfile.read(file.name, dtype="float32")
    if rate != SAMPLE_RATE:
        samples = resample_poly(samples, SAMPLE_RATE, rate)
    return log_mel(torch.as_tensor(samples, dtype=torch.float32))


@functools.cache
def _flite_voices() -> list[str]:
    return _run("flite", "-lv").decode().partition(":")[2].split()


def _run(program: str, *arguments: str) -> bytes:
    if shutil.which(program) is None:
        raise RuntimeError(f"{program} is not installed; on Debian: apt-get install espeak-ng flite")
    return subprocess.run([program, *arguments], check=True, capture_output=True).stdout
