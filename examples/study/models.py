"""The study's models: a language model of text, a speech encoder, and the adapter between them."""

import string

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..demo.speech import MELS
from .world import BOS, EOS, PAD, VOCABULARY

WIDTH = 128  # of the encoder and of the language model
LAYERS = 4  # of the language model; its hidden states are those of 5 places, from the embeddings on
STRIDE = 2  # of the encoder, over 10 ms frames
CHARACTERS = "-" + string.ascii_lowercase  # 0 is CTC's blank


def language_model() -> LlamaForCausalLM:
    """A small Llama over the study's words, untrained."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=WIDTH**-0.5,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


class Encoder(nn.Module):
    """A recogniser of characters by CTC, `(B, T, MELS)` at 100 Hz to states `(B, ceil(T / 2), WIDTH)` at 50 Hz."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(MELS, WIDTH, 5, padding=2)
        self.second = nn.Conv1d(WIDTH, WIDTH, 5, stride=STRIDE, padding=2)
        self.position = nn.Conv1d(WIDTH, WIDTH, 15, padding=7, groups=16)  # where a frame stands among its neighbours
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 3 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States and their lengths."""
        x = mel.mT
        for conv in (self.first, self.second):
            x = F.gelu(conv(_zeroed(x, lengths)))
            lengths = (lengths - 1) // conv.stride[0] + 1
        x = _zeroed(x, lengths)
        x = (x + F.gelu(self.position(x))).mT
        return self.layers(x, src_key_padding_mask=torch.arange(x.shape[1]) >= lengths[:, None]), lengths


class Adapter(nn.Module):
    """Embeddings for the language model, one every 80 ms, each from 0.5 s of the encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, width, 7, 2, padding=3) for width in (WIDTH, 2 * WIDTH))
        self.project = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, T, WIDTH)` to `(B, ceil(T / 4), WIDTH)`, and the lengths."""
        x = states.mT
        for conv in self.convs:
            x = F.gelu(conv(_zeroed(x, lengths)))
            lengths = (lengths - 1) // 2 + 1
        return self.project(x.mT), lengths


def _zeroed(x: Tensor, lengths: Tensor) -> Tensor:
    """`(B, C, T)` with zeros for padding, so that an item does not depend on its batch."""
    return x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
