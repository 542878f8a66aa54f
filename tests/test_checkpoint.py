"""What is written is what is read, in every layout that means the same, without copying and in no time."""

import time
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from refengine.checkpoint import Checkpoint
from refengine.random_model import random_values
from refengine.write_checkpoint import write, write_sparse
from spec.config import Config, InputError
from spec.model import Model
from spec.ops import numpy_backend
from spec.tensors import table
from tests import releases
from tests.checkpoints import CONFIGS, add, alter, alter_json, expected, random_checkpoint, rename

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


@pytest.mark.parametrize(("name", "shards", "tensors", "seconds"),
                         [("nano", 13, 6243, 0.5), ("ultra", 100, 51023, 4.0)])  # fmt: skip
def test_opening_takes_no_time(name, shards, tensors, seconds, tmp_path, record_property):
    write_sparse(tmp_path, releases.CONFIGS[name], shards=shards)
    began = time.process_time()
    checkpoint = Checkpoint.open(tmp_path)
    took = time.process_time() - began
    assert len(checkpoint.stored) == tensors and len(checkpoint.files) == shards
    assert not checkpoint.read("backbone.layers.0.mixer.A_log").any()
    assert took < seconds
    size = sum(file.size for file in checkpoint.files) / 1e9
    record_property("measured", f"{name}, {size:.0f} GB in {tensors} tensors, opens in {took:.2f} s")


def test_opening_takes_no_memory(tmp_path):
    write_sparse(tmp_path, releases.CONFIGS["nano"])
    tracemalloc.start()
    checkpoint = Checkpoint.open(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20 and checkpoint.files[0].size > 60e9


def test_a_prediction_head_lost_by_a_resave_is_noted(tmp_path):
    cfg = CONFIGS["head"]
    random_checkpoint(tmp_path, cfg)
    rename(tmp_path / "model.safetensors", lambda name: None if name.startswith("mtp.") else name)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == "" and "prediction head" in checkpoint.notes[0]
    assert all(not name.startswith("mtp.") for name in checkpoint.stored)


def test_a_prediction_head_that_is_not_declared_is_noted(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["head"])
    alter_json(tmp_path / "config.json", num_nextn_predict_layers=0)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == "" and "mtp tensors" in checkpoint.notes[0]


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path):
    cfg = CONFIGS["tied"]
    path = random_checkpoint(tmp_path, cfg) / "model.safetensors"
    table_ = np.array(Checkpoint.open(tmp_path).read("backbone.embeddings.weight"))
    before = path.read_bytes()
    add(path, "lm_head.weight", table_, "BF16")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).stored
    path.write_bytes(before)
    table_[-1, -1] += 1
    add(path, "lm_head.weight", table_, "BF16")
    with pytest.raises(InputError, match="lm_head"):
        Checkpoint.open(tmp_path)


def test_tensors_that_change_nothing_leave_a_note(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["attention"]) / "model.safetensors"
    add(path, "backbone.layers.0.mixer.rotary_emb.inv_freq", np.ones(5, np.float32), "F32")
    add(path, "backbone.layers.1.mixer.k_proj.k_scale", np.ones((), np.float32), "F32")
    (note,) = Checkpoint.open(tmp_path).notes
    assert "inv_freq' and 1 more" in note


def test_several_files_need_no_index_and_strangers_are_noted(tmp_path):
    cfg = CONFIGS["dense"]
    random_checkpoint(tmp_path, cfg, shards=3)
    names = [file.path.name for file in Checkpoint.open(tmp_path).files]
    (tmp_path / "adapter.safetensors").write_bytes(b"another program's")
    assert Checkpoint.open(tmp_path).notes == ("adapter.safetensors is not part of the model: not read",)
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert [file.path.name for file in Checkpoint.open(tmp_path).files] == names and len(names) == 3


def test_links_to_files_elsewhere_are_followed(tmp_path):
    """The download cache of the Hugging Face hub is made of them."""
    stored = random_checkpoint(tmp_path / "blobs", CONFIGS["mamba"])
    (tmp_path / "snapshot").mkdir()
    for path in stored.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path / "snapshot").fingerprint() == Checkpoint.open(stored).fingerprint()


def test_the_fingerprint_tells_models_apart(tmp_path):
    cfg = CONFIGS["experts"]
    plain = random_checkpoint(tmp_path / "plain", cfg)
    prints = {Checkpoint.open(plain).fingerprint()}
    for i, (seed, how) in enumerate([(0, {}), (1, {}), (0, {"shards": 2}), (0, {"dtype": "F32"})]):
        prints.add(Checkpoint.open(random_checkpoint(tmp_path / str(i), cfg, seed, **how)).fingerprint())
    alter_json(plain / "config.json", routed_scaling_factor=1.5)
    prints.add(Checkpoint.open(plain).fingerprint())
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
    """16 MiB of embedding, of which the process holds nothing after release."""
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


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    cfg = CONFIGS["latent"]
    values = random_values(cfg)

    def failing(row):
        if row.name.startswith("backbone.layers.2."):
            raise RuntimeError("out of luck")
        return values(row)

    with pytest.raises(RuntimeError, match="out of luck"):
        write(tmp_path, cfg, failing, shards=3)
    assert not list(tmp_path.iterdir())


def test_a_write_replaces_its_own_files_and_no_others(tmp_path):
    cfg = CONFIGS["mamba"]
    random_checkpoint(tmp_path, cfg, seed=1)
    random_checkpoint(tmp_path, cfg, seed=2)
    row = table(cfg)[0]
    assert np.array_equal(Checkpoint.open(tmp_path).read(row.name), expected(row, cfg, seed=2))
    with pytest.raises(InputError, match=r"holds model\.safetensors"):
        random_checkpoint(tmp_path, cfg, shards=2)
    assert np.array_equal(Checkpoint.open(tmp_path).read(row.name), expected(row, cfg, seed=2))


def test_values_of_the_wrong_shape_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"embeddings\.weight is"):
        write(tmp_path, CONFIGS["mamba"], lambda row: np.zeros((2, *row.shape)))


def test_random_weights_are_as_in_a_trained_model():
    cfg = CONFIGS["head"]
    values = random_values(cfg, seed=3)
    for row in table(cfg):
        value = values(row)
        assert value.shape == row.shape and value.dtype == np.float32 and np.isfinite(value).all(), row.name
        assert np.array_equal(value, random_values(cfg, seed=3)(row)), "the seed and the name decide"
        if row.key.endswith("A_log"):
            assert np.exp(value).min() >= 1 and np.exp(value).max() <= 16
        if row.key.endswith("dt_bias"):
            dt = np.logaddexp(0, value)
            assert dt.min() > 2.9e-4 and dt.max() < 0.31
