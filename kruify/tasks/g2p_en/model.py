"""The network: a GRU reads the letters, another one spells out the sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.tasks._cells import output_size, recurrent
from kruify.tasks.g2p_en.lexicon import GRAPHEMES, PHONEMES, START, STOP

MAX_PHONEMES = 20  # where the package's own predict() gives up


class G2PNetwork(nn.Module):
    """Encoder-decoder without attention; `encoder` and `decoder` are used through nn.GRU's interface alone.

    Any layer with that interface may stand in their place, so a converted network runs the same code.
    """

    def __init__(self, hidden: int = 256, cell: str = "gru", factors: str = "auto") -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(len(GRAPHEMES), hidden)
        self.encoder = recurrent(cell, hidden, hidden, factors=factors, batch_first=True)
        self.dec_emb = nn.Embedding(len(PHONEMES), hidden)
        self.decoder = recurrent(cell, hidden, hidden, factors=factors, batch_first=True)
        self.fc = nn.Linear(output_size(self.decoder), len(PHONEMES))

    def encode(
        self,
        graphemes: Tensor,  # (batch, letters) int64, padded
        lengths: Tensor,  # (batch,) int64
    ) -> Any:  # the decoder's initial state: (1, batch, hidden), a pair of them for an LSTM
        """Return the encoder's state after each word's last letter; what stands behind it has no influence."""
        embedded = self.enc_emb(graphemes)
        if bool((lengths == graphemes.shape[1]).all()):
            return self.encoder(embedded)[1]
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.encoder(packed)[1]

    def forward(
        self,
        graphemes: Tensor,  # (batch, letters) int64, padded
        lengths: Tensor,  # (batch,) int64
        inputs: Tensor,  # (batch, steps) int64: <s>, then the phonemes so far
    ) -> Tensor:  # (batch, steps, 74)
        """Return the logits of the next phoneme at every step (teacher forcing)."""
        outputs, _ = self.decoder(self.dec_emb(inputs), self.encode(graphemes, lengths))
        logits: Tensor = self.fc(outputs)
        return logits

    @torch.no_grad()
    def decode(
        self,
        graphemes: Tensor,  # (batch, letters) int64, padded
        lengths: Tensor,  # (batch,) int64
        steps: int = MAX_PHONEMES,
    ) -> Tensor:  # (batch, steps) int64; from the first STOP on all are STOP
        """Return the greedily chosen phonemes. Words that have stopped leave the batch."""
        state = self.encode(graphemes, lengths)
        chosen = graphemes.new_full((len(graphemes), steps), STOP)
        alive = torch.arange(len(graphemes), device=graphemes.device)
        last = graphemes.new_full((len(graphemes), 1), START)
        for step in range(steps):
            outputs, state = self.decoder(self.dec_emb(last), state)
            last = self.fc(outputs).argmax(-1)
            chosen[alive, step] = last[:, 0]
            going = last[:, 0] != STOP
            if not going.all():
                alive, last, state = alive[going], last[going], _keep(state, going)
            if not len(alive):
                break
        return chosen


def _keep(state: Any, rows: Tensor) -> Any:
    if isinstance(state, Tensor):
        return state[:, rows].contiguous()
    return tuple(_keep(part, rows) for part in state)
