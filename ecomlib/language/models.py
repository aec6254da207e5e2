"""A classifier of events on top of a joint encoder, and four ways of adapting the encoder (chapter "Behaviour
prediction with a pretrained encoder")."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..families.base import check, number, require, whole
from .behaviour import EVENTS
from .encoder import Encoder
from .sessions import TARGETS, Batch, SessionDataset

ADAPTATIONS = ("frozen", "top", "full", "lora")
"""What is trained besides the head: nothing; the last layers; everything; low-rank additions to the attention
(Hu et al. 2022)."""


@dataclass(frozen=True)
class ClassifierConfig:
    """A head for events and sessions, and what of the encoder is trained."""

    adaptation: str = "full"
    """One of ADAPTATIONS."""
    top_layers: int = 2
    """Layers, counted from the output, that "top" trains."""
    lora_rank: int = 8
    """Rank of the additions of "lora" to the query and value maps."""
    lora_scale: float = 16.0
    """The additions are multiplied by lora_scale / lora_rank."""
    hidden: int = 128
    """Units of the head's hidden layer."""
    dropout: float = 0.1
    """In the head, and in LoRA's additions; the encoder keeps the dropout of its own configuration."""
    session_weight: float = 0.2
    """Weight of the session-level loss beside the event-level loss."""
    seed: int = 0
    """Of the head's and LoRA's first weights."""

    def __post_init__(self):
        check(self, "adaptation", lambda x: x in ADAPTATIONS, f"one of {', '.join(ADAPTATIONS)}")
        check(self, "top_layers", lambda x: whole(x, 1, 1000), "a whole number from 1 to 1000")
        check(self, "lora_rank", lambda x: whole(x, 1, 1024), "a whole number from 1 to 1024")
        check(self, "lora_scale", lambda x: number(x) and x > 0, "a number > 0")
        check(self, "hidden", lambda x: whole(x, 1, 65536), "a whole number from 1 to 65536")
        check(self, "dropout", lambda x: number(x) and 0 <= x < 1, "a number >= 0 and < 1")
        check(self, "session_weight", lambda x: number(x) and x >= 0, "a number >= 0")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")


class Logits(NamedTuple):
    """What the classifier says of a batch."""

    event: Tensor  # (B, k, 5) of each product of the slate, before the softmax
    session: Tensor  # (B, 3) of TARGETS, before the sigmoid


class EventClassifier(nn.Module):
    """Reads a history and a slate as one sequence, and predicts the event of every product and what the session will
    come to.

    A product is the mean p of the outputs at its tokens, the history the mean c over all tokens that belong to no
    product; the head sees p, c and p c, entry by entry and each normalised, and an own constant for each place. One
    network has both heads: multi-task learning.
    """

    def __init__(self, encoder: Encoder, config: ClassifierConfig = ClassifierConfig(), places: int = 4):
        """The encoder's model is copied, so that several classifiers may start from one encoder."""
        super().__init__()
        require(whole(places, 1, 1000), "places", places, "a whole number from 1 to 1000")
        self.config, self.digest = config, encoder.digest
        size = encoder.size
        device = encoder.model.device
        with torch.random.fork_rng(devices=[]):  # torch.nn and peft draw from torch's global generator
            torch.manual_seed(config.seed)
            self.encoder = _adapted(deepcopy(encoder.model).float().to("cpu"), config)
            self.normal = nn.LayerNorm(size, elementwise_affine=False)
            self.event = _head(3 * size, config, len(EVENTS))
            self.session = _head(size, config, len(TARGETS))
        self.place = nn.Parameter(torch.zeros(places, len(EVENTS), dtype=torch.float32))
        self.register_buffer("shift", torch.zeros(len(EVENTS), dtype=torch.float32))
        self.float().to(device)

    def forward(self, batch: Batch) -> Logits:
        """Logits of a batch on the classifier's device. At most ``places`` products in a slate."""
        k = batch.event.shape[1]
        require(k <= len(self.place), "places of a slate", k, f"at most {len(self.place)}, as the classifier was made")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.adaptation != "frozen"):
            hidden = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        hidden = hidden.float()
        product = _mean(hidden, batch.product[:, None] == torch.arange(k, device=hidden.device)[:, None])
        context = _mean(hidden, ((batch.product < 0) & (batch.attention_mask > 0))[:, None])
        p, c = self.normal(product), self.normal(context).expand(-1, k, -1)
        event = self.event(torch.cat((p, c, p * c), -1)).float() + self.place[:k]
        return Logits(event, self.session(self.normal(context[:, 0])).float())

    def train(self, mode: bool = True) -> EventClassifier:
        """As in torch, but a frozen encoder stays in evaluation mode: its dropout would be noise for nothing."""
        super().train(mode)
        if self.config.adaptation == "frozen":
            self.encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.place.device

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def start_from(self, rates: NDArray[np.float64]) -> None:
        """Set the constants of the output to the log of the events' base rates at each place (places, 5), so that
        training starts from rates by place: a few hundred small steps would hardly reach them."""
        with torch.no_grad():
            self.event[-1].bias.zero_()
            self.place.copy_(torch.as_tensor(np.log(rates), dtype=torch.float32))


def _mean(hidden: Tensor, chosen: Tensor) -> Tensor:
    """(B, n, size) means of hidden (B, L, size) over the tokens of chosen (B, n, L); 0 where there is none."""
    weight = chosen.to(hidden.dtype)
    return weight @ hidden / weight.sum(-1, keepdim=True).clamp(min=1)


def _head(size: int, config: ClassifierConfig, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Linear(size, config.hidden),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, outputs),
    )


def _adapted(model: Any, config: ClassifierConfig) -> Any:
    """The model with ``requires_grad`` where it is to be trained, and LoRA's additions."""
    model.requires_grad_(config.adaptation == "full")
    if config.adaptation == "top":
        layers = model.encoder.layer
        require(config.top_layers <= len(layers), "ClassifierConfig.top_layers", config.top_layers, f"1..{len(layers)}")
        for layer in layers[-config.top_layers :]:
            layer.requires_grad_(True)
    if config.adaptation == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("adaptation 'lora' needs peft: pip install peft") from error
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_scale,
            lora_dropout=config.dropout,
            target_modules=["query", "value"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            model = get_peft_model(model, settings)
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)  # nothing reads what it gives
    return model


class Predictions(NamedTuple):
    """Probabilities for a data set."""

    event: NDArray[np.float64]  # (rows, 5) for each impression, in the order of the events it was made from
    session: NDArray[np.float64]  # (slates, 3) that each of TARGETS is reached, in the data set's order


def predict(
    model: EventClassifier, data: SessionDataset, batch: int = 256, autocast: bool = False, corrected: bool = True
) -> Predictions:
    """What ``model`` expects, in evaluation mode.

    A classifier trained with class weights over-predicts what was given weight; ``corrected`` takes the weights out
    again, equation (eq-prior-correction). ``autocast`` computes in bfloat16 where that is fast.
    """
    event = np.full((int(data.row.max()) + 1, len(EVENTS)), np.nan)
    session = []
    for part, logits in evaluated(model, data, batch, autocast):
        inside = part.row >= 0
        log_odds = logits.event - model.shift if corrected else logits.event
        event[part.row[inside].numpy()] = torch.softmax(log_odds.double(), -1).cpu().numpy()[inside.numpy()]
        session.append(torch.sigmoid(logits.session.double()).cpu().numpy())
    return Predictions(event, np.concatenate(session))


def evaluated(
    model: EventClassifier, data: SessionDataset, batch: int = 256, autocast: bool = False
) -> Iterator[tuple[Batch, Logits]]:
    """Batches of ``data`` in order, each with its logits; no gradient, no dropout."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        for part in data.batches(batch):
            yield part, model(on_device(part, model.device))
    model.train(training)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device; the row numbers stay."""
    return Batch(*(x.to(device, non_blocking=True) for x in batch[:-1]), batch.row)


def ensemble(members: list[Predictions]) -> Predictions:
    """The mean probability of several classifiers of the same data set."""
    require(len(members) > 0, "members", members, "at least one")
    return Predictions(*(np.mean(parts, 0) for parts in zip(*members)))


def further_pretrained(
    encoder: Encoder,
    texts: list[str],
    epochs: int = 20,
    batch: int = 64,
    lr: float = 5e-5,
    masked: float = 0.15,
    seed: int = 0,
) -> Encoder:
    """A copy of the encoder, trained on to guess hidden words of ``texts`` (masked-language modelling, Devlin et al.
    2019; before a task, Gururangan et al. 2020).

    Of the tokens, a share ``masked`` is to be guessed: 80 % of them are replaced by [MASK], 10 % by a random token, as
    transformers' DataCollatorForLanguageModeling does. The head that guesses starts from the word vectors and is thrown
    away. Give the texts of training products alone.
    """
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    require(len(texts) >= batch, "texts", len(texts), f"at least a batch of {batch}")
    generator = torch.Generator().manual_seed(seed)
    tokens = encoder.tokens(texts)
    collate = DataCollatorForLanguageModeling(encoder.tokenizer, mlm_probability=masked, seed=seed)
    device = encoder.model.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(encoder.model.config).float()
        body = getattr(model, model.base_model_prefix)
        body.load_state_dict(encoder.model.state_dict(), strict=False)  # a pooler has no place here
        model.to(device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        total, step = epochs * (len(tokens) // batch), 0
        for _ in range(epochs):
            order = torch.randperm(len(tokens), generator=generator).tolist()
            for start in range(0, len(order) - batch + 1, batch):
                part = collate([{"input_ids": tokens[row]} for row in order[start : start + batch]])
                optimiser.param_groups[0]["lr"] = lr * (1 - step / total)
                loss = model(**{name: value.to(device) for name, value in part.items()}).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
        copy = deepcopy(encoder.model)
        copy.load_state_dict(body.state_dict(), strict=False)
    return replace(
        encoder, name=f"{encoder.name}, further pretrained", model=copy.eval(), digest=f"{encoder.digest}+{seed}"
    )
