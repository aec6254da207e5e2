"""Checkpoints: what is written comes back, and whatever else a file may hold is refused by name."""

import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecomlib.checkpoints import CheckpointError, CheckpointFolder, pack, unpack
from ecomlib.files import write_atomically
from ecomlib.learners import MetaTraining

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def state(iteration: int = 4, value: float = 0.5) -> MetaTraining:
    meta = [torch.full((2, 3), value), torch.arange(3.0)]
    memory = {"step": [torch.tensor(4.0)] * 2, "exp_avg": [p / 3 for p in meta], "exp_avg_sq": [p**2 for p in meta]}
    return MetaTraining(iteration, meta, memory, [])


def folder(path: Path, keep: int = 3, config: str = "hash", seeds: tuple[int, ...] = (0,)) -> CheckpointFolder:
    return CheckpointFolder(path / "checkpoints", config, seeds, keep)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def same(a: MetaTraining, b: MetaTraining) -> bool:
    trees = [([*s.meta], s.memory and [s.memory[k] for k in ("step", "exp_avg", "exp_avg_sq")]) for s in (a, b)]
    flat = [[*meta, *(t for ts in memory or [] for t in ts)] for meta, memory in trees]
    equal = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*flat, strict=True))
    return equal and a.iteration == b.iteration


# ------------------------------------------------------------------------------------------ there and back
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)


@quick
@given(st.lists(tensors, min_size=1, max_size=4), st.integers(0, 10**9), st.lists(st.integers(0, 2**32), min_size=1))
def test_what_is_packed_is_unpacked(meta, iteration, seeds):
    memory = {"step": [torch.tensor(1.0)] * len(meta), "exp_avg": meta, "exp_avg_sq": meta}
    for remembered in (None, memory):
        before = MetaTraining(iteration, meta, remembered, [])
        data = pack(before, "hash", tuple(seeds))
        assert same(unpack(data, "file", "hash", tuple(seeds)), before)
        assert pack(before, "hash", tuple(seeds)) == data  # the same state is the same bytes


def test_last_ones_and_the_best_are_kept(tmp_path):
    where = folder(tmp_path, keep=2)
    for iteration, score in enumerate([0.1, 0.9, None, float("nan"), 0.3], 1):
        where.save(state(iteration, iteration), score)
    assert [e.iteration for e in where.entries()] == [2, 4, 5]
    assert {p.name for p in where.path.iterdir()} == {"index.json"} | {e.file for e in where.entries()}
    assert where.load().iteration == 5 and same(where.load("best"), state(2, 2))


def test_one_out_of_turn_goes_with_the_next(tmp_path):
    """Whoever presses Ctrl-C ends with the same files."""
    stopped, whole = folder(tmp_path / "a", keep=2), folder(tmp_path / "b", keep=2)
    for iteration in range(1, 7):
        stopped.save(state(iteration), iteration % 3, out_of_turn=iteration % 2 == 1)
        if iteration % 2 == 0:
            whole.save(state(iteration), iteration % 3)
        assert stopped.load().iteration == iteration
    names = lambda where: {p.name: p.read_bytes() for p in where.path.iterdir()}
    assert names(stopped) == names(whole)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    where = folder(tmp_path)
    where.save(state(1))
    (where.path / "iteration-000009.safetensors").write_bytes(b"not in the index")
    (where.path / ".index.json.77.unfinished").write_bytes(b"half")
    (where.path / "iteration-notes.safetensors").write_bytes(b"not ours")
    where.tidy()
    names = {p.name for p in where.path.iterdir()}
    assert names == {"index.json", "iteration-000001.safetensors", "iteration-notes.safetensors"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, bad):
    """Adam's squares overflow long before its parameters do."""
    where = folder(tmp_path)
    where.save(state(1))
    before = contents(tmp_path)
    wrong = state(2)
    wrong.memory["exp_avg_sq"][0][0, 0] = bad
    with pytest.raises(FloatingPointError, match="memory.exp_avg_sq.0 of iteration 2"):
        where.save(wrong)
    assert contents(tmp_path) == before


def test_only_tensors_lists_and_numbers_are_written():
    wrong = MetaTraining(1, [torch.ones(1)], {"hook": print}, [])
    with pytest.raises(TypeError, match=r"memory\.hook is a builtin_function_or_method"):
        pack(wrong, "hash", (0,))
    with pytest.raises(TypeError, match="strings other than 'tensor'"):
        pack(MetaTraining(1, [torch.ones(1)], {3: 1}, []), "hash", (0,))


# ------------------------------------------------------------------------------------------ damage
def flip(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]


DAMAGE = {
    "a bit of a tensor": lambda data: flip(data, len(data) - 3),
    "a bit of the header": lambda data: flip(data, 40),
    "a bit of the header's length": lambda data: flip(data, 0),
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "something behind": lambda data: data + b"\0",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, damage):
    where = folder(tmp_path)
    where.save(state(2))
    file = where.save(state(4))
    file.write_bytes(damage(file.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        where.load()
    message = str(refusal.value)
    assert str(file) in message and "delete it to go on from iteration 2" in message and "\n" not in message
    assert contents(tmp_path) == before
    file.unlink()  # as the message says
    assert where.missing() == [file] and where.load().iteration == 2


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_without_an_index(damage):
    """Even where somebody made the SHA-256 fit: a file is never half understood."""
    data = damage(pack(state(), "hash", (0,)))
    try:
        assert not same(unpack(data, "file", "hash", (0,)), state())  # one number differs: only the SHA-256 knows
    except CheckpointError as error:
        assert str(error).startswith("file ") and "\n" not in str(error)


def test_another_configuration_and_other_seeds_are_named(tmp_path):
    folder(tmp_path).save(state())
    for other in (folder(tmp_path, config="other"), folder(tmp_path, seeds=(1,))):
        with pytest.raises(CheckpointError, match="iteration-000004.safetensors belongs to another configuration"):
            other.load()


class Exploit:
    """A pickle that would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def header(json_text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(json_text)) + json_text.encode() + body


def forged(**changes) -> bytes:
    data = pack(state(), "hash", (0,))
    found = json.loads(safetensors_metadata(data)["ecomlib"])
    tensors = safetensors.torch.load(data)
    return safetensors.torch.save(tensors, {"ecomlib": json.dumps(found | changes)})


def safetensors_metadata(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def malicious(path: Path) -> dict[str, bytes]:
    tensor = {"tensor": "meta.0"}
    nested = "[" * 100_000
    return {
        "a pickle": pickle.dumps(Exploit(path)),
        "a file of torch.save": Path(_torch_file(path)).read_bytes(),
        "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
        "a header of 2^64 - 1 bytes": b"\xff" * 8,
        "deeply nested JSON": header(nested),
        "deeply nested JSON inside": header(json.dumps({"__metadata__": {"ecomlib": nested}})),
        "deeply nested state": header(json.dumps({"__metadata__": {"ecomlib": nested + "]" * 100_000}})),
        "JSON": b'{"format": "ecomlib checkpoint"}',
        "a list": header("[]"),
        "no metadata": safetensors.torch.save({"meta.0": torch.ones(2)}),
        "of another library": safetensors.torch.save({"weight": torch.ones(2)}, {"format": "pt"}),
        "a future version": forged(version=2),
        "another format": forged(format="pickle"),
        "an iteration that is no number": forged(iteration="4"),
        "an iteration before the first": forged(iteration=-1),
        "an iteration that is True": forged(iteration=True),
        "seeds that are a number": forged(generators={"seeds": 3}),
        "a tensor that is not there": forged(meta=[{"tensor": "../../etc/passwd"}]),
        "a tensor named by a list": forged(meta=[{"tensor": ["meta.0"]}]),
        "parameters that are no list": forged(meta=tensor),
        "parameters that are numbers": forged(meta=[1.0]),
        "tensors that overlap": header(
            json.dumps(
                {
                    "meta.0": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
                    "meta.1": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
                }
            ),
            b"\0" * 8,
        ),
        "a shape of 2^60 numbers": header(
            json.dumps({"meta.0": {"dtype": "F64", "shape": [2**60], "data_offsets": [0, 8]}}), b"\0" * 8
        ),
        "a hundred thousand tensors": header(
            json.dumps({f"meta.{i}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})
        ),
    }


def _torch_file(path: Path) -> Path:
    file = path.with_name("torch.pt")
    torch.save({"meta": Exploit(path)}, file)
    return file


def test_malicious_files_are_refused_and_nothing_happens(tmp_path):
    """Each is listed in the index with its right SHA-256, as a forger would."""
    exploited = tmp_path / "exploited"
    for name, data in malicious(exploited).items():
        where = folder(tmp_path / name.replace("/", " "))
        file = where.save(state())
        file.write_bytes(data)
        index = json.loads((where.path / "index.json").read_bytes())
        index["checkpoints"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (where.path / "index.json").write_text(json.dumps(index))
        before = contents(where.path)
        with pytest.raises(CheckpointError) as refusal:
            where.load()
        assert str(refusal.value).startswith(f"{file} is no checkpoint of this library"), name
        assert contents(where.path) == before and not exploited.exists(), name


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    where = folder(tmp_path)
    where.save(state(2))
    data = pack(state(9), "hash", (0,))
    (where.path / "iteration-000002.safetensors").write_bytes(data)
    index = json.loads((where.path / "index.json").read_bytes())
    index["checkpoints"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (where.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds iteration 9; the index says 2"):
        where.load()


# ------------------------------------------------------------------------------------------ the index
def entry(**changes) -> dict:
    right = {"file": "iteration-000004.safetensors", "iteration": 4, "score": 0.5, "sha256": "0" * 64, "bytes": 9}
    return right | {"out_of_turn": False} | changes


def index(*entries: dict, **changes) -> str:
    right = {"format": "ecomlib checkpoint", "version": 1, "best": None, "checkpoints": entries}
    return json.dumps(right | changes)


INDICES = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "nested": "[" * 100_000,
    "a future version": index(version=2),
    "another format": index(format="x"),
    "no entries": json.dumps({"format": "ecomlib checkpoint", "version": 1}),
    "an entry that is a text": index("iteration-000004.safetensors"),
    "an entry with another field": index(entry(url="http://example.org")),
    "a name outside the folder": index(entry(file="../../x")),
    "an absolute name": index(entry(file="/etc/passwd")),
    "a name that only begins well": index(entry(file="iteration-000004.safetensors/../../x")),
    "a name with a line end": index(entry(file="iteration-000004.safetensors\n")),
    "a name that is a number": index(entry(file=4)),
    "bytes that are a text": index(entry(bytes="9")),
    "a score that is a text": index(entry(score="high")),
    "a score that is not finite": index(entry(score=float("nan"))),
    "a best one that is not listed": index(entry(), best="iteration-000005.safetensors"),
    "a best one that is a list": index(entry(), best=["iteration-000004.safetensors"]),
}


@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
def test_a_wrong_index_is_named_and_left_alone(tmp_path, text):
    where = folder(tmp_path)
    where.save(state())
    (where.path / "index.json").write_text(text)
    before = contents(tmp_path)
    for attempt in (where.load, lambda: where.load("best"), where.entries, where.tidy):
        with pytest.raises(CheckpointError) as refusal:
            attempt()
        assert str(where.path / "index.json") in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


def test_a_wrong_sha_is_damage(tmp_path):
    where = folder(tmp_path)
    where.save(state())
    (where.path / "index.json").write_text(index(entry()))
    with pytest.raises(CheckpointError, match="is damaged"):
        where.load()


# ------------------------------------------------------------------------------------------ any bytes
VALID = pack(state(), "hash", (0,))
edits = st.builds(
    lambda at, byte, cut: (VALID[:at] + bytes([byte]) + VALID[at + 1 :])[:cut],
    st.integers(0, len(VALID) - 1),
    st.integers(0, 255),
    st.integers(0, 2 * len(VALID)),
)


@quick
@given(st.one_of(st.binary(max_size=200), edits, st.text(max_size=99).map(header)))
def test_any_bytes_give_a_state_or_a_refusal(data):
    try:
        found = unpack(data, "file", "hash", (0,))
    except CheckpointError as error:
        assert str(error).startswith("file ")
    else:
        assert all(p.isfinite().all() for p in found.meta)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
listed = st.fixed_dictionaries({name: json_values | st.just(value) for name, value in entry().items()})


@quick
@given(
    st.one_of(
        st.binary(max_size=100),
        json_values.map(lambda x: json.dumps(x).encode()),
        st.builds(lambda es, best: index(*es, best=best).encode(), st.lists(listed, max_size=3), json_values),
    )
)
def test_any_index_gives_entries_or_a_refusal(tmp_path, data):
    where = folder(tmp_path)
    where.path.mkdir(exist_ok=True)
    (where.path / "index.json").write_bytes(data)
    for attempt in (where.entries, where.load):
        try:
            attempt()
        except CheckpointError as error:
            assert str(where.path) in str(error)


# ------------------------------------------------------------------------------------------ files
def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*a.json'"):
        write_atomically(file, b"new")
    assert contents(tmp_path) == {str(file): b"old"}
