"""A written checkpoint is read back unchanged, in every layout, without copies and without delay."""

import sys
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.write import write_sparse
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.tensors import table
from tests.support.checkpoints import CONFIGS, alter, alter_json, expected, random_checkpoint
from tests.support.tries import thorough
from tools import releases

LAYOUTS = {
    "as released": {},
    "in shards": {"shards": 3},
    "as in transformers": {"prefix": "model.", "stacked": True},
    "in shards, stacked": {"shards": 4, "stacked": True},
    "in float32": {"dtype": "F32"},
    "in float16": {"dtype": "F16", "shards": 2, "prefix": "model."},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_reads_back_as_it_was_written(kind, layout, tmp_path):
    cfg, how = CONFIGS[kind], LAYOUTS[layout]
    with Checkpoint.open(random_checkpoint(tmp_path, cfg, **how)) as checkpoint:
        assert checkpoint.config == cfg and not checkpoint.notes
        assert list(checkpoint.stored) == [row.name for row in table(cfg)]
        for row in table(cfg):
            value, truth = checkpoint.read(row.name), expected(row, cfg, dtype=how.get("dtype"))
            assert value.dtype == truth.dtype and np.array_equal(value, truth), row.name
            assert checkpoint.bytes_of(row) == truth.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_safetensors_library_reads_the_same(layout, tmp_path):
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path, CONFIGS["head"], **LAYOUTS[layout]))
    for file in checkpoint.files:
        with safe_open(file.path, framework="np") as theirs:
            assert set(theirs.keys()) == set(file.tensors)
            for name, at in file.tensors.items():
                assert np.array_equal(theirs.get_tensor(name), at.array()), name


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_saves_is_read(original, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = CONFIGS["latent"]
    torch.manual_seed(0)
    theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig.from_dict(cfg.to_hf()))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB", save_original_format=original)
    checkpoint, state = Checkpoint.open(tmp_path), theirs.state_dict()
    assert len(checkpoint.files) > 1 and checkpoint.config.layers == cfg.layers
    for row in table(cfg):
        name = row.name.replace("backbone.", "model.")
        if row.role == "routed_expert":
            experts, e, matrix, _ = name.rsplit(".", 3)
            truth = state[f"{experts}.{matrix}"][int(e)]
        else:
            truth = state[name]
        assert np.array_equal(checkpoint.read(row.name), truth.float().numpy()), row.name


def test_the_layout_does_not_change_what_the_model_computes(tmp_path):
    cfg = CONFIGS["latent"]
    ids = np.arange(40).reshape(2, 20)
    logits = []
    for i, how in enumerate(LAYOUTS.values()):
        if "dtype" not in how:
            checkpoint = Checkpoint.open(random_checkpoint(tmp_path / str(i), cfg, **how))
            model = Model.build(cfg, checkpoint.read, numpy_backend())
            logits.append(model.head(model.blocks(model.embed(ids), model.new_states(2))[0]))
    assert np.isfinite(logits[0]).all() and logits[0].std() > 0.1
    assert all(np.array_equal(logits[0], other) for other in logits)


def test_reading_copies_nothing_and_nothing_can_be_written(tmp_path):
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path, CONFIGS["mamba"]))
    for name in checkpoint.stored:
        once, again = checkpoint.read(name), checkpoint.read(name)
        assert once.ctypes.data == again.ctypes.data and once.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            once[...] = 0


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path):
    cfg = CONFIGS["attention"]
    random_checkpoint(tmp_path, cfg, dtype="F32")

    def shift(header, data):
        header.pop("__metadata__")
        text = str(header).replace("'", '"').replace("(", "[").replace(")", "]").encode()
        return text + b" " * (1 + -len(text) % 8), data

    alter(tmp_path / "model.safetensors", shift)
    checkpoint = Checkpoint.open(tmp_path)
    for row in table(cfg):
        value = checkpoint.read(row.name)
        assert checkpoint.stored[row.name].offset % 4 == 1
        assert value.flags.aligned and not value.flags.writeable
        assert np.array_equal(value, expected(row, cfg, dtype="F32"))


@pytest.mark.parametrize(
    ("name", "shards", "tensors"), [("nano", 13, 6243), *thorough(("ultra", 100, 51023))]
)
def test_opening_takes_a_few_calls_a_tensor(name, shards, tensors, tmp_path, record_property):
    """Calls are counted instead of seconds, because they do not depend on the load of the machine."""
    write_sparse(tmp_path, releases.CONFIGS[name], shards=shards)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        checkpoint = Checkpoint.open(tmp_path)
    finally:
        sys.setprofile(None)
    assert len(checkpoint.stored) == tensors and len(checkpoint.files) == shards
    assert not checkpoint.read("backbone.layers.0.mixer.A_log").any()
    record_property(f"worst calls a tensor to open {name}", calls / tensors)
    assert calls < 200 * tensors


def test_opening_takes_no_memory(tmp_path):
    write_sparse(tmp_path, releases.CONFIGS["nano"])
    tracemalloc.start()
    checkpoint = Checkpoint.open(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20 and checkpoint.files[0].size > 60e9


def test_the_digest_tells_models_apart(tmp_path):
    cfg = CONFIGS["experts"]
    plain = random_checkpoint(tmp_path / "plain", cfg)
    prints = {Checkpoint.open(plain).digest()}
    for i, (seed, how) in enumerate([(0, {}), (1, {}), (0, {"shards": 2}), (0, {"dtype": "F32"})]):
        prints.add(Checkpoint.open(random_checkpoint(tmp_path / str(i), cfg, seed, **how)).digest())
    alter_json(plain / "config.json", routed_scaling_factor=1.5)
    prints.add(Checkpoint.open(plain).digest())
    assert len(prints) == 5, "the first two are one"


def test_arrays_outlive_release_and_close(tmp_path):
    cfg = CONFIGS["head"]
    with Checkpoint.open(random_checkpoint(tmp_path, cfg, shards=2)) as checkpoint:
        values = {row: checkpoint.read(row.name) for row in table(cfg)}
        checkpoint.release()
        checkpoint.release(["backbone.embeddings.weight"])
    for row, value in values.items():
        assert np.array_equal(value, expected(row, cfg))


def test_release_gives_memory_back(tmp_path):
    """After release, the process holds none of the 16 MiB of an embedding."""
    cfg = Config.from_hf(CONFIGS["attention"].to_hf() | {"vocab_size": 16 * 2**20 // (2 * 26)})
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path, cfg))
    weights = checkpoint.read("backbone.embeddings.weight").view(np.uint16)

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096 // 2**20

    try:
        before = resident()
    except OSError:
        pytest.skip("this system does not tell how much memory a process holds")
    weights.max()
    full = resident()
    checkpoint.release()
    assert full - before >= 14 and resident() - before <= 2
