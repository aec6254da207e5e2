"""Low-rank adapters whose starting point is meta-learned: a pretrained encoder as a network of the learners (chapter
"Few-shot across categories and shops").

LoRA (Hu et al. 2022) leaves a weight matrix W as it is and learns a correction of low rank r, so that a layer computes
x W + x A B (alpha / r). Here A and B may have a task axis: every task has adapters of its own around the same frozen
encoder, in one batch, and whatever ``learners.adaptation.adapt`` does to parameters it does to adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn

from ..families.base import check, number, require, whole
from .encoder import Encoder, mean_pooled
from .features import PLACES

TEXT_LENGTH = 4.0
"""Length of a text's vector before the head: a step of descent then moves head and corrections at a like pace."""


@dataclass(frozen=True)
class LoRAConfig:
    """Where the corrections sit, and how large they may be."""

    rank: int = 4
    """r."""
    alpha: float = 8.0
    """The correction is multiplied by alpha / r."""
    layers: tuple[str, ...] = ("query", "value")
    """Names of the linear layers, in every block of the encoder, that are corrected."""
    last: int | None = None
    """Correct only that many of the last blocks; None is all."""
    autocast: bool = False
    """Compute in bfloat16 where torch holds that to be safe; faster on a GPU and on processors that have it."""

    def __post_init__(self):
        check(self, "rank", lambda x: whole(x, 1, 1024), "a whole number from 1 to 1024")
        check(self, "alpha", lambda x: number(x, 0), "a finite number > 0")
        names = lambda x: isinstance(x, tuple) and len(x) > 0 and all(isinstance(name, str) for name in x)
        check(self, "layers", names, "names of linear layers, at least one")
        check(self, "last", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")


class Corrected(nn.Module):
    """A frozen linear layer and its correction of the moment."""

    def __init__(self, layer: nn.Linear, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.pair: tuple[Tensor, Tensor] | None = None
        """A (in, r) and B (r, out), or (task, in, r) and (task, r, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, L, in) -> (sequences, L, out); with a task axis, sequences are tasks times points."""
        result = self.layer(x)
        if self.pair is None:
            return result
        down, up = self.pair
        tasks = max(len(p) if p.dim() == 3 else 1 for p in (down, up))
        rows = x.reshape(tasks, -1, x.shape[-1]) if tasks > 1 else x
        return result + (rows @ down @ up).reshape(result.shape) * self.scale


class AdaptedEncoder:
    """A pretrained encoder, low-rank corrections and a linear head, as a ``Network``: parameters are the corrections
    and the head alone, shared or one set per task.

    An observation is a row of ``token_rows``: token numbers, padded, and in the last column the place in the slate. It
    is an int64 tensor (task, points, L + 1), so that the learners cut it like any other. After ``remember`` it is
    (task, points, 2): the number of a text and the place. Blocks below the first corrected one are then computed once
    for every text instead of at every step: with the last block alone adapted, a step costs a sixth.

    The second derivatives of MAML pass through attention. The fused kernels of ``scaled_dot_product_attention`` have
    none (``tests/test_adapters.py`` shows which fail): load the encoder with ``attention="eager"``, or wrap training in
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. First-order methods take any.
    """

    def __init__(self, encoder: Encoder, config: LoRAConfig | None = None, output_size: int = 2):
        """The encoder's model is changed in place: its chosen layers are wrapped, its parameters frozen. Raises
        ValueError where it has none of ``config.layers``, or has been wrapped before."""
        require(whole(output_size, 1), "output_size", output_size, "a whole number >= 1")
        self.encoder, self.config, self.output_size = encoder, config or LoRAConfig(), output_size
        self.pad = encoder.tokenizer.pad_token_id
        model = encoder.model
        require(
            not any(isinstance(part, Corrected) for part in model.modules()), "encoder", encoder.name, "one not in use"
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        blocks = list(model.encoder.layer)
        self.first = len(blocks) - min(self.config.last or len(blocks), len(blocks))
        self.memory: tuple[Tensor, Tensor] | None = None
        scale = self.config.alpha / self.config.rank
        self.corrected: list[Corrected] = []
        for block in blocks[self.first :]:
            for parent in list(block.modules()):
                for name, layer in list(parent.named_children()):
                    if name in self.config.layers and isinstance(layer, nn.Linear):
                        wrapped = Corrected(layer, scale)
                        setattr(parent, name, wrapped)
                        self.corrected.append(wrapped)
        require(len(self.corrected) > 0, "LoRAConfig.layers", self.config.layers, "names of linear layers of a block")
        model.eval()
        self.tensors = 2 * len(self.corrected) + 2
        self.head = (self.tensors - 2, self.tensors - 1)

    def initial(self, generator: Generator) -> list[Tensor]:
        """A ~ Normal(0, 1 / in), B = 0, so that the encoder starts as it was pretrained; a head of zeros."""
        like = next(self.encoder.model.parameters())
        found = []
        for wrapped in self.corrected:
            rows, rank = wrapped.layer.in_features, self.config.rank
            down = torch.randn(rows, rank, generator=generator, device=generator.device, dtype=torch.float64)
            found += [(down / math.sqrt(rows)).to(like), like.new_zeros(rank, wrapped.layer.out_features)]
        return [
            *found,
            like.new_zeros(self.encoder.size + PLACES, self.output_size),
            like.new_zeros(1, self.output_size),
        ]

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(task, points, L + 1) int64 -> (task, points, output); without a task axis, (points, L + 1) -> (points,
        output)."""
        *lead, columns = observation.shape
        flat, like = observation.reshape(-1, columns), parameters[-1]
        with self._with(parameters), torch.autocast(like.device.type, torch.bfloat16, enabled=self.config.autocast):
            hidden, mask = self._read(flat[:, :-1])
        text = mean_pooled(hidden.to(like.dtype), mask) * TEXT_LENGTH
        where = torch.nn.functional.one_hot(flat[:, -1].clamp(max=PLACES - 1), PLACES).to(like.dtype)
        rows = torch.cat((text, where), -1).reshape(*lead, -1)
        return rows @ parameters[-2] + parameters[-1]

    def remember(self, tokens: Tensor, batch: int = 256) -> None:
        """Compute what enters the first corrected block for every row of ``tokens`` (texts, L), and keep it."""
        parts, mask = [], self._mask(tokens)
        with torch.no_grad():
            for start in range(0, len(tokens), batch):
                part = slice(start, start + batch)
                found = self.encoder.model(tokens[part], attention_mask=mask[part], output_hidden_states=True)
                parts.append(found.hidden_states[self.first])
        self.memory = torch.cat(parts), mask

    def _mask(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.pad).long()
        mask[:, 0] = 1  # a row of padding alone, of a shopper who had left, still has one mark to read
        return mask

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last block, (rows, L, size), and their mask."""
        if self.memory is None:
            mask = self._mask(rows)
            return self.encoder.model(rows, attention_mask=mask).last_hidden_state, mask
        hidden, mask = (kept[rows[:, 0]] for kept in self.memory)
        away = (1.0 - mask[:, None, None].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        for block in self.encoder.model.encoder.layer[self.first :]:
            found = block(hidden, away)
            hidden = found[0] if isinstance(found, tuple) else found
        return hidden, mask

    @contextmanager
    def _with(self, parameters: list[Tensor]) -> Iterator[None]:
        for i, wrapped in enumerate(self.corrected):
            wrapped.pair = (parameters[2 * i], parameters[2 * i + 1])
        try:
            yield
        finally:
            for wrapped in self.corrected:
                wrapped.pair = None

    @property
    def numbers(self) -> int:
        """How many numbers a task adapts."""
        return sum(p.numel() for p in self.initial(Generator().manual_seed(0)))


def text_tokens(texts: Sequence[str], encoder: Encoder, max_tokens: int = 32) -> Tensor:
    """(texts, L) int64 on the encoder's device: what ``AdaptedEncoder.remember`` takes; longer texts lose their end."""
    return encoder.padded([ids[:max_tokens] for ids in encoder.tokens(list(texts), encoder.longest)])[0]


def product_rows(events: pd.DataFrame) -> np.ndarray:
    """(rows, 2) int64: the product and its place in the slate, what a network that remembers the products' texts
    reads."""
    return events[["product", "place"]].to_numpy(np.int64, copy=True)


def token_rows(events: pd.DataFrame, texts: Sequence[str], encoder: Encoder, max_tokens: int = 32) -> np.ndarray:
    """(rows, L + 1) int64: what the encoder reads for each impression, and its place in the slate.

    ``[CLS] candidate [SEP] product last acted on in an earlier slate of the session [SEP]``, cut at the end and padded
    to the longest; where nothing was acted on, the candidate alone. Rows keep the order of ``events``.
    """
    require(whole(max_tokens, 8, encoder.longest), "max_tokens", max_tokens, f"8 to {encoder.longest}")
    tokenizer = encoder.tokenizer
    words = [ids[1:-1] for ids in encoder.tokens(list(texts), encoder.longest)]
    start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    order = np.lexsort((events["place"], events["slate"], events["session"]))
    session, slate, product, event, place = (
        events[name].to_numpy()[order] for name in ("session", "slate", "product", "event", "place")
    )
    pairs: dict[tuple[int, int], int] = {}
    code = np.empty(len(events), np.int64)
    liked, fresh, current = -1, -1, (None, None)
    for i in range(len(order)):
        if session[i] != current[0]:
            liked = fresh = -1
        elif slate[i] != current[1]:
            liked = fresh
        current = (session[i], slate[i])
        code[i] = pairs.setdefault((product[i], liked), len(pairs))
        if event[i] > 0:
            fresh = product[i]
    rows = []
    for shown, before in pairs:
        tail = [] if before < 0 else [*words[before], end]
        rows.append([start, *words[shown], end, *tail][:max_tokens])
    table = np.full((len(rows), max(map(len, rows)) + 1), pad, np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    result = np.empty((len(events), table.shape[1]), np.int64)
    result[order] = table[code]
    result[order, -1] = place
    return result
