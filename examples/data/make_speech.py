"""Make examples/data: forty short sentences spoken by espeak-ng in two voices, with the times of their words and phonemes.

Needs espeak-ng's shared library (Debian: ``apt-get install libespeak-ng1``), numpy, scipy and soundfile; the demo
needs only the files that this script wrote. Run it as ``python examples/data/make_speech.py``.

The synthesiser reports the times while it speaks, so they are exact. Each time is checked against the audio before
anything is written (`check_times`).
"""

import ctypes
import json
import re
from itertools import pairwise
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

DATA = Path(__file__).resolve().parent
SAMPLE_RATE = 16_000
GAIN = 0.5  # so that the resampler cannot clip
STEPS = 4096  # 13 bits a sample: FLAC does not store low bits that are zero

# Name in the files: (espeak-ng's voice, words per minute). The rates differ, so that the times of one voice do not fit
# the other.
VOICES = {
    "us": ("en-us", 165),
    "gb": ("en-gb-x-rp+f1", 150),
}

# Pairs such as "of the" are avoided: espeak-ng speaks them as one word and reports no time for the second.
SENTENCES = [
    "Seven green parrots argued about a biscuit.",
    "My brother fixes old clocks, and they never agree.",
    "Please close that window, it is raining again.",
    "A quiet fox jumped over our garden wall.",
    "We boiled twelve eggs for our picnic.",
    "Nobody knew why Victor wore two hats.",
    "The river froze early, so we walked home.",
    "Her violin sounds warm when winter comes.",
    "Jack asked for tea, but they gave him soup.",
    "Thunder rolled across nine empty hills.",
    "Every Friday my uncle bakes dark bread.",
    "Turn left, then follow that narrow path.",
    "Zebras cannot read any traffic signs.",
    "She counted slowly, one, two, three.",
    "Our boat leaks, yet nobody seems worried.",
    "Fresh paint covers many small mistakes.",
    "Yes, you may borrow my yellow umbrella.",
    "George keeps his money under a loose brick.",
    "Such a tiny spider made this huge web.",
    "Wait, someone is knocking at your door.",
    "Large black clouds gathered before noon.",
    "The judge smiled, and everyone relaxed.",
    "Quick hands pick the sweetest cherries.",
    "Grandmother hums while she waters her roses.",
    "Move those boxes, then sweep every corner.",
    "No train stops here after half past six.",
    "Five lazy dogs slept beside a warm stove.",
    "I think a mouse lives behind our fridge.",
    "Bright lamps drew moths from far away.",
    "Speak softly, since babies are sleeping.",
    "Cold soup tastes better than no soup.",
    "That joke was awful, but we laughed anyway.",
    "Young doctors rarely sleep enough.",
    "The moon looked orange above those dunes.",
    "Each puzzle has exactly one missing piece.",
    "He whistled twice, and his horse came back.",
    "Sugar dissolves faster when water boils.",
    "Ravens remember people who feed them.",
    "Open your book, chapter four begins there.",
    "Maps cannot show how steep these streets feel.",
]


class Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng's speak_lib.h; its last member is a union, of which only `char string[8]` is read."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    ]


EVENT_LIST_END, EVENT_WORD, EVENT_PHONEME = 0, 1, 7
RATE = 1  # espeak_PARAMETER
SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


class Synthesiser:
    """libespeak-ng through ctypes: text in, samples and events out."""

    def __init__(self):
        self.lib = ctypes.CDLL("libespeak-ng.so.1")
        synchronous, phoneme_events, as_ipa = 2, 1, 2
        self.native_rate = self.lib.espeak_Initialize(synchronous, 0, None, phoneme_events | as_ipa)
        if self.native_rate <= 0:
            raise RuntimeError("espeak_Initialize failed: is espeak-ng-data installed?")
        self.callback = SYNTH_CALLBACK(self._receive)
        self.lib.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, events):
        if samples and count:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for event in events:
            if event.type == EVENT_LIST_END:
                return 0
            # `sample` is exact where `audio_position` is rounded to milliseconds.
            time = event.sample / self.native_rate
            if event.type == EVENT_WORD:
                self.words.append((time, event.text_position - 1, event.length))
            elif event.type == EVENT_PHONEME:
                self.phonemes.append((time, event.string.decode()))

    def speak(self, text: str, voice: str, words_per_minute: int):
        """Return the samples at `native_rate`, [(start, first character, length)] and [(start, IPA)]; "" is a pause."""
        self.chunks, self.words, self.phonemes = [], [], []
        if self.lib.espeak_SetVoiceByName(voice.encode()):  # without this check, the previous voice would speak
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(RATE, words_per_minute, 0)
        buffer = text.encode("ascii")  # so that the synthesiser's character positions are ours
        by_character, ascii_or_utf8 = 1, 1
        if self.lib.espeak_Synth(buffer, len(buffer) + 1, 0, by_character, 0, ascii_or_utf8, None, None):
            raise RuntimeError(f"espeak-ng could not speak {text!r}")
        return np.concatenate(self.chunks) / 32768, self.words, self.phonemes


def timed(text: str, words, phonemes, duration: float):
    """Give every phoneme and word its end: a phoneme ends where the next starts, a word with the last of its phonemes.

    A word thus ends before a pause that follows it, not at the next word's start.
    """
    starts = [time for time, _ in phonemes] + [duration]
    sounds = [
        {"ipa": ipa, "start": start, "end": end}
        for (start, ipa), end in zip(phonemes, starts[1:], strict=True)
        if ipa and end > start
    ]
    expected = [match.span() for match in re.finditer(r"[A-Za-z]+", text)]
    words = [word for word in words if word[2]]  # pauses come as words of no length
    spans = [(first, first + length) for _, first, length in words]
    if spans != expected:
        raise RuntimeError(f"{text!r}: the synthesiser merged or split words: {[text[i:j] for i, j in spans]}")
    borders = [start for start, _, _ in words] + [duration]
    spoken = []
    for (first, last), (start, stop) in zip(spans, pairwise(borders), strict=True):
        own = [s for s in sounds if start <= s["start"] < stop]
        spoken.append(
            {"text": text[first:last], "span": [first, last], "start": own[0]["start"], "end": own[-1]["end"]}
        )
    return spoken, sounds


def check_times(samples, words, phonemes) -> None:
    """Raise unless the times fit the audio: silence where no phoneme is spoken, sound in every word, nothing cut off."""
    duration = len(samples) / SAMPLE_RATE

    def level(start, end, margin=0.0):
        piece = samples[round((start + margin) * SAMPLE_RATE) : round((end - margin) * SAMPLE_RATE)]
        return np.sqrt(np.mean(piece**2)) if len(piece) else 0.0

    assert all(level(w["start"], w["end"]) > 0.01 for w in words), "a word without sound"
    assert all(w["start"] < w["end"] <= v["start"] for w, v in pairwise(words)), "words overlap"
    assert 0 <= words[0]["start"] < 0.06 and 0 <= duration - words[-1]["end"] < 0.1, "silence around the words"
    assert abs(phonemes[-1]["end"] - words[-1]["end"]) < 1e-9
    pauses = [(p["end"], q["start"]) for p, q in pairwise(phonemes)]
    for start, end in [(0.0, phonemes[0]["start"]), *pauses, (phonemes[-1]["end"], duration)]:
        assert end - start < 0.05 or level(start, end, margin=0.015) < 0.001, "a pause with sound"


def rounded(rows):
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def main() -> None:
    synthesiser = Synthesiser()
    common = gcd(SAMPLE_RATE, synthesiser.native_rate)
    entries = []
    for number, text in enumerate(SENTENCES):
        for name, (voice, rate) in VOICES.items():
            raw, words, phonemes = synthesiser.speak(text, voice, rate)
            samples = GAIN * resample_poly(raw, SAMPLE_RATE // common, synthesiser.native_rate // common)
            words, phonemes = timed(text, words, phonemes, len(raw) / synthesiser.native_rate)
            check_times(samples, words, phonemes)
            file = f"{number:02d}_{name}.flac"
            coarse = np.round(samples * STEPS) / STEPS
            soundfile.write(DATA / file, coarse, SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)
            entries.append(
                {
                    "file": file,
                    "voice": voice,
                    "sentence": number,
                    "text": text,
                    "duration": round(len(samples) / SAMPLE_RATE, 4),
                    "words": rounded(words),
                    "phonemes": rounded(phonemes),
                }
            )
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (DATA / "sentences.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    size = sum((DATA / entry["file"]).stat().st_size for entry in entries)
    seconds = sum(entry["duration"] for entry in entries)
    print(f"{len(entries)} recordings, {seconds:.0f} s, {size / 1e6:.2f} MB in {DATA}")


if __name__ == "__main__":
    main()
