"""The model and the data of the scripts here: a small Qwen2-Audio with random weights, the recordings of data/."""

import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "demo"))
from speech import ALPHABET, MELS, Utterance, load

PAD, BEGIN, END, AUDIO = range(4)
FRAMES = 400  # of 10 ms: all recordings are padded to 4 s; the padding has no placeholders


def tiny_model(seed: int = 0) -> transformers.Qwen2AudioForConditionalGeneration:
    """The real class: encoder, projector and language model, 0.3 million parameters."""
    torch.manual_seed(seed)
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 4 + len(ALPHABET),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        },
        audio_token_index=AUDIO,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config).train()


class Recordings(torch.utils.data.Dataset):
    """Each recording with its transcript in characters, as the model's processor would give it."""

    def __init__(self, count: int | None = None) -> None:
        self.utterances = load()[:count]

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row(self.utterances[index])


def row(utterance: Utterance) -> dict[str, Tensor]:
    mel = utterance.mel.T
    placeholders = (mel.shape[1] + 1) // 2 // 2
    text = [4 + ALPHABET.index(character) for character in utterance.text] + [END]
    prompt = [BEGIN] + [AUDIO] * placeholders
    return {
        "input_ids": torch.tensor(prompt + text),
        "labels": torch.tensor([-100] * len(prompt) + text),
        "attention_mask": torch.ones(len(prompt) + len(text), dtype=torch.int64),
        "input_features": torch.nn.functional.pad(mel, (0, FRAMES - mel.shape[1])),
        "feature_attention_mask": (torch.arange(FRAMES) < mel.shape[1]).long(),
    }


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    fill = {"input_ids": PAD, "labels": -100, "attention_mask": 0}
    return {
        key: torch.nn.utils.rnn.pad_sequence([r[key] for r in rows], batch_first=True, padding_value=fill.get(key, 0))
        for key in rows[0]
    }
