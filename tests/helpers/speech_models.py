"""Speech language models of Hugging Face with few random weights, each with a batch to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS = 100, 32, 3, 2
MELS, ENCODER_WIDTH = 8, 16
PAD, BOS, END, AUDIO = 0, 1, 2, 99

# A token occurs twice in each transcript: apart in the first, side by side in the second.
PROMPTS = [BOS, 11, 12], [BOS, 13]
TRANSCRIPTS = [41, 42, 41, 43, 44, 45], [51, 52, 52, 53]

WHISPER_FRAMES = 40
AUDIO_FRAMES = 40, 26


@dataclass
class Case:
    """A model in train mode, arguments for its forward, and the part that computes the speech embeddings for the LLM."""

    model: nn.Module
    batch: dict[str, Tensor]
    audio_token_id: int
    adapter: nn.Module | None


def qwen2_audio() -> Case:
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": ENCODER_WIDTH, **whisper(), **encoder()},
        text_config={"model_type": "qwen2", **decoder()},
        audio_token_index=AUDIO,
    )
    model = build(transformers.Qwen2AudioForConditionalGeneration, config)
    batch = tokens([pooled(frames) for frames in AUDIO_FRAMES])
    batch["input_features"], batch["feature_attention_mask"] = mel(AUDIO_FRAMES)
    return Case(model, batch, AUDIO, model.model.multi_modal_projector)


def voxtral() -> Case:
    """Its audio is cut into chunks of one length: two for the first row, one for the second."""
    stacked = 4
    config = transformers.VoxtralConfig(
        audio_config={
            "model_type": "voxtral_encoder",
            **whisper(),
            "hidden_size": ENCODER_WIDTH,
            "intermediate_size": stacked * ENCODER_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
        },
        text_config={"model_type": "llama", "head_dim": WIDTH // HEADS, **decoder()},
        audio_token_id=AUDIO,
    )
    model = build(transformers.VoxtralForConditionalGeneration, config)
    chunks = 2, 1
    batch = tokens([count * WHISPER_FRAMES // 2 // stacked for count in chunks])
    batch["input_features"], _ = mel([WHISPER_FRAMES] * sum(chunks))
    return Case(model, batch, AUDIO, model.model.multi_modal_projector)


def granite_speech() -> Case:
    """Its projector makes three embeddings of every window; the LLM multiplies its input embeddings by twelve."""
    window, downsample, frames = 6, 2, (24, 14)
    config = transformers.GraniteSpeechConfig(
        encoder_config={
            "model_type": "granite_speech_encoder",
            "input_dim": MELS,
            "hidden_dim": ENCODER_WIDTH,
            "num_layers": 2,
            "num_heads": HEADS,
            "feedforward_mult": 2,
            "output_dim": 12,
            "context_size": 8,
            "max_pos_emb": 16,
            "conv_kernel_size": 3,
            "dropout": 0.0,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": ENCODER_WIDTH,
            "encoder_hidden_size": ENCODER_WIDTH,
            "intermediate_size": 2 * ENCODER_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.2,
        },
        text_config={"model_type": "granite", "embedding_multiplier": 12.0, **decoder()},
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        window_size=window,
        downsample_rate=downsample,
        initializer_range=0.2,
    )
    model = build(transformers.GraniteSpeechForConditionalGeneration, config)
    counts = [-(-count // window) * (window // downsample) for count in frames]
    batch = tokens(counts)
    batch["input_features"] = mel(frames)[0].mT.contiguous()
    batch["input_features_mask"] = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return Case(model, batch, AUDIO, model.model.projector)


def audio_flamingo3() -> Case:
    config = transformers.AudioFlamingo3Config(
        audio_config={
            "model_type": "audioflamingo3_encoder",
            **whisper(),
            "hidden_size": ENCODER_WIDTH,
            "intermediate_size": 2 * ENCODER_WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
        },
        text_config={"model_type": "qwen2", **decoder()},
        audio_token_id=AUDIO,
    )
    model = build(transformers.AudioFlamingo3ForConditionalGeneration, config)
    batch = tokens([pooled(frames) for frames in AUDIO_FRAMES])
    batch["input_features"], batch["input_features_mask"] = mel(AUDIO_FRAMES)
    return Case(model, batch, AUDIO, model.model.multi_modal_projector)


def qwen2_5_omni() -> Case:
    """Its projector is the last layer of its encoder. It also has an image encoder, which these tests do not use."""
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config={"d_model": ENCODER_WIDTH, "output_dim": WIDTH, "n_window": 8, **whisper(), **encoder()},
        vision_config={
            "depth": 1,
            "hidden_size": ENCODER_WIDTH,
            "intermediate_size": ENCODER_WIDTH,
            "num_heads": HEADS,
            "patch_size": 2,
            "window_size": 8,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        text_config={
            **decoder(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        },
        audio_token_index=AUDIO,
        image_token_index=98,
        video_token_index=97,
        vision_start_token_id=96,
        audio_start_token_id=95,
        audio_end_token_id=94,
        initializer_range=0.2,
    )
    model = build(transformers.Qwen2_5OmniThinkerForConditionalGeneration, config)
    batch = tokens([pooled(frames) for frames in AUDIO_FRAMES])
    batch["input_features"], batch["feature_attention_mask"] = mel(AUDIO_FRAMES)
    return Case(model, batch, AUDIO, model.model.audio_tower.proj)


CASES: dict[str, Callable[[], Case]] = {
    "qwen2_audio": qwen2_audio,
    "voxtral": voxtral,
    "granite_speech": granite_speech,
    "audio_flamingo3": audio_flamingo3,
    "qwen2_5_omni": qwen2_5_omni,
}


def left_padded(batch: dict[str, Tensor], pad_id: int = PAD) -> dict[str, Tensor]:
    """The same batch with the padding on the left of its tokens."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    moved = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask", "labels")}
    moved["input_ids"] = moved["input_ids"].masked_fill(moved["attention_mask"] == 0, pad_id)
    return {**batch, **moved}


def decoder() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": END,
    }


def encoder() -> dict[str, Any]:
    return {"encoder_layers": 1, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * ENCODER_WIDTH}


def whisper() -> dict[str, Any]:
    return {"num_mel_bins": MELS, "max_source_positions": WHISPER_FRAMES // 2, "initializer_range": 0.2}


def build(kind: type[transformers.PreTrainedModel], config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return kind(config).train()


def pooled(frames: int) -> int:
    """The number of embeddings for so many frames: a convolution halves it, rounding up, then a mean of pairs, rounding down."""
    return (frames + 1) // 2 // 2


def mel(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Features (B, MELS, T), zero behind each length, and the mask (B, T) of valid frames."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), MELS, max(lengths), generator=generator) * mask[:, None], mask.long()


def tokens(placeholders: Sequence[int]) -> dict[str, Tensor]:
    """Rows of prompt, placeholders of speech, transcript and end, padded on the right."""
    rows, targets = [], []
    for prompt, count, transcript in zip(PROMPTS, placeholders, TRANSCRIPTS, strict=True):
        target = [*transcript, END]
        context = [*prompt, *[AUDIO] * count]
        rows.append(torch.tensor(context + target))
        targets.append(torch.tensor([-100] * len(context) + target))
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, True, PAD),
        "attention_mask": pad([torch.ones_like(row) for row in rows], True),
        "labels": pad(targets, True, -100),
    }
