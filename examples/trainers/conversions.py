"""Functions to copy that convert the lengths and masks of other toolkits: `python examples/trainers/conversions.py`.

Each function takes the tensors that the toolkit has where it computes its losses. All of them give the same loss.
"""

import torch
from torch import Tensor

import otalign
from otalign import layout

criterion = otalign.speech.OTRegLoss(count_calls=False)


def speechbrain(speech: Tensor, speech_lens: Tensor, tokens: Tensor, tokens_lens: Tensor, embed) -> Tensor:
    """In `Brain.compute_objectives`: lengths relative to the longest item, floats in [0, 1]."""
    speech, n = layout.to_padded(*layout.from_relative_lengths(speech, speech_lens))
    text, m = layout.to_padded(*layout.from_relative_lengths(embed(tokens), tokens_lens))
    return criterion(speech, text, n, m, tokens[:, : text.shape[1]])


def espnet(encoder_out: Tensor, encoder_out_lens: Tensor, text: Tensor, text_lengths: Tensor, embed) -> Tensor:
    """In the model's forward, which returns (loss, stats, weight): integer lengths, text padded with -1."""
    tokens = text.masked_fill(text == -1, 0)
    return criterion(encoder_out, embed(tokens), encoder_out_lens, text_lengths, tokens)


def nemo(speech: Tensor, speech_mask: Tensor, tokens: Tensor, token_mask: Tensor, embed) -> Tensor:
    """In `training_step` of a SALM: padding on the left, masks that are True on valid positions."""
    speech, n = layout.to_padded(*layout.from_mask(speech, speech_mask))
    text, m = layout.to_padded(*layout.from_mask(embed(tokens), token_mask))
    ids, _ = layout.to_padded(*layout.from_mask(tokens[..., None], token_mask))
    return criterion(speech, text, n, m, ids[..., 0])


def fairseq(encoder_out: Tensor, key_padding_mask: Tensor, target: Tensor, pad: int, embed) -> Tensor:
    """In a criterion: states are time-major, masks are True on the padding, and losses are sums with a sample_size."""
    speech, n = layout.to_padded(*layout.from_padding_mask(encoder_out.transpose(0, 1), key_padding_mask))
    losses = criterion.items(speech, embed(target), n, (target != pad).sum(1), target).loss
    return losses.sum()


def hugging_face(hidden: Tensor, attention_mask: Tensor, tokens: Tensor, token_mask: Tensor, embed) -> Tensor:
    """Without `otalign.attach`: masks that are 1 on valid positions."""
    return nemo(hidden, attention_mask, tokens, token_mask, embed)


def packed(speech: Tensor, cu_seqlens: Tensor, text: Tensor, cu_seqlens_text: Tensor) -> Tensor:
    """Without padding, as in FlashAttention: the solver takes packed batches directly."""
    return otalign.sinkhorn_loss(
        speech, text, cu_seqlens_x=cu_seqlens, cu_seqlens_y=cu_seqlens_text, objective="plan_cost"
    )


def main() -> dict[str, float]:
    """The loss of the same two items, in the layout of each toolkit."""
    torch.manual_seed(0)
    embed = torch.nn.Embedding(20, 16)
    frames, words = [torch.randn(n, 16) for n in (30, 21)], [torch.randperm(16)[:m] + 3 for m in (8, 5)]
    n, m = torch.tensor([30, 21]), torch.tensor([8, 5])
    speech, tokens = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (frames, words))
    inside_x, inside_y = (torch.arange(int(k.max())) < k[:, None] for k in (n, m))

    def left(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")

    found = {
        "speechbrain": speechbrain(speech, n / n.max(), tokens, m / m.max(), embed),
        "espnet": espnet(speech, n, tokens.masked_fill(~inside_y, -1), m, embed),
        "nemo": nemo(left(frames), inside_x.flip(1), left(words), inside_y.flip(1), embed),
        "fairseq": fairseq(speech.transpose(0, 1), ~inside_x, tokens, 0, embed) / len(frames),
        "hugging_face": hugging_face(speech, inside_x.long(), tokens, inside_y.long(), embed),
        "packed": packed(
            torch.cat(frames), torch.tensor([0, 30, 51]), embed(torch.cat(words)), torch.tensor([0, 8, 13])
        ),
    }
    return {name: loss.item() for name, loss in found.items()}


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:15}{loss:.6f}")
