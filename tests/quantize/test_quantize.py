"""`refengine quantize` writes the model in the format of each recipe, whole or not at all."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import refengine
from refengine.checkpoint import Checkpoint
from refengine.cli.quantize import quantize as command
from refengine.quantize import FORMATS, RECIPES, quantize, recipe_of
from refengine.quantize import write as module
from refengine.quantize.write import STATE, plan
from refengine.spec.config import InputError
from refengine.spec.quant import E4M3, TOP_4_OVER_6, Packed, nvfp4
from refengine.spec.tensors import groups, table
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG
from tools.releases import CONFIGS

pytestmark = pytest.mark.slow

TEXT = "Once upon a time"


@pytest.fixture
def model(tmp_path):
    return random_checkpoint(tmp_path / "model", CFG)


def files(path):
    return {each.name: each.read_bytes() for each in sorted(Path(path).iterdir())}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_weight_is_the_one_that_the_recipe_asks_for(recipe, model, tmp_path):
    chosen = recipe_of(recipe)
    errors = quantize(model, tmp_path / "out", chosen, strip=500)
    old, new = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    assert not new.notes and new.config == old.config
    for group in groups(table(CFG)):
        largest = max(np.abs(old.read(row.name)).max() for row in group.rows)
        for row in group.rows:
            name, found, exact = chosen.format_of(row, CFG), new.read(row.name), old.read(row.name)
            if name == "plain":
                assert found.dtype == exact.dtype and np.array_equal(found, exact), row.name
                continue
            share = group.name == "qkv_proj" and FORMATS[name].kind == "NVFP4"
            amax = np.float32(largest if share else np.abs(exact).max())
            if name == "fp8_mse" and found.scale > 1.1 * amax / 448:
                amax = np.float32((1.5 * amax).astype(exact.dtype))
            wanted = FORMATS[name].pack(exact, amax)
            assert isinstance(found, Packed) and np.array_equal(found.codes, wanted.codes), row.name
            assert np.array_equal(found.scale, wanted.scale) and found.scale_2 == wanted.scale_2, row.name
    roles = {row.role for row in table(CFG) if chosen.format_of(row, CFG) != "plain"}
    assert set(errors) == roles and "routed_expert" in roles
    assert all(0 < part["error"] < 0.02 for part in errors.values())


@pytest.mark.parametrize(
    ("model", "recipe", "matrices", "total"),
    [
        # published, or predicted (Ultra): the sums count scales of inputs, and two of the cache a layer
        ("nano", "nano", {"NVFP4": 5_968}, 24_147),
        ("lightning", "lightning", {"NVFP4": 5_935, "FP8": 46}, 18_487),
        ("ultra", "ultra", {"NVFP4": 49_152, "FP8": 192}, 198_887),
    ],
)
def test_the_tensors_count_as_those_of_the_released_files(model, recipe, matrices, total):
    cfg, chosen = CONFIGS[model], recipe_of(recipe)
    rows = table(cfg)
    kinds = [FORMATS[name].kind for row in rows if (name := chosen.format_of(row, cfg)) != "plain"]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == matrices
    with_inputs = 2 if model == "lightning" else 3
    cache = 0 if model == "nano" else 2 * cfg.layers.count("*")
    assert len(rows) + matrices["NVFP4"] * with_inputs + matrices.get("FP8", 0) * 2 + cache == total


def test_supers_recipe_is_a_file_of_names(tmp_path):
    """It was found by a search layer by layer; the sums and some of the layers are published."""
    cfg, path = CONFIGS["super"], tmp_path / "super.toml"
    kinds = {kind: [i for i, each in enumerate(cfg.layers) if each == kind] for kind in "M*E"}
    layers = {
        "in_proj": kinds["M"][:28], "out_proj": kinds["M"][:29], "shared_experts.up_proj": kinds["E"][:39],
        "shared_experts.down_proj": kinds["E"][1:38], "fc1_latent_proj": (1, 3, 5), "fc2_latent_proj": (3,),
        "o_proj": (69, 78),
    }  # fmt: skip
    names = [f"backbone.layers.{i}.mixer.{key}.weight" for key, at in layers.items() for i in at]
    lines = [f'"{name}" = "fp8"' for name in names]
    lines += ['"backbone.layers.1.mixer.shared_experts.down_proj.weight" = "nvfp4"']
    path.write_text('[roles]\nrouted_expert = "nvfp4"\n[names]\n' + "\n".join(lines))
    chosen, rows = recipe_of(str(path)), table(cfg)
    formats = [chosen.format_of(row, cfg) for row in rows]
    assert formats.count("fp8") == 139 and formats.count("nvfp4") == 40_961
    assert len(rows) + 3 * 40_961 + 2 * 139 + 2 * cfg.layers.count("*") == 165_860


def test_four_over_six_gains_on_the_embedded_model(tmp_path):
    """The median squared error of the experts' matrices falls by about 16 percent, and rises in none."""
    errors = quantize("tiny", tmp_path / "46", recipe_of("ultra"))
    assert 0.15 < errors["routed_expert"]["gain"] < 0.18
    quantize("tiny", tmp_path / "six", recipe_of("super"))
    old, six, four = (Checkpoint.open(each) for each in ("tiny", tmp_path / "six", tmp_path / "46"))
    for row in table(old.config):
        if row.role == "routed_expert" and not row.block.startswith("mtp."):
            exact = old.read(row.name).astype(np.float32)
            a, b = (np.square(each.read(row.name).dequantize() - exact).sum() for each in (six, four))
            assert b < a, row.name


def test_four_over_six_is_worse_in_no_block_of_the_embedded_model_but_where_a_scale_is_a_tie():
    """There modelopt rounds a scale in one way in its search and in another in the file."""
    checkpoint, blocks, worse = Checkpoint.open("tiny"), 0, 0
    ties = (E4M3[1:126].astype(float) + E4M3[2:127]) / 2  # halfway between two positive numbers
    for row in table(checkpoint.config):
        if row.role == "routed_expert" and not row.block.startswith("mtp."):
            w = checkpoint.read(row.name)
            exact = w.astype(float)
            found = [nvfp4(w, top=TOP_4_OVER_6), nvfp4(w, four_over_six=True)]
            six, four = (np.square(p.dequantize() - exact).reshape(-1, 16).sum(axis=1) for p in found)
            wrong = four > six * (1 + 1e-6)
            scale = np.abs(exact).reshape(-1, 16)[wrong].max(axis=1) / np.abs(exact).max() * TOP_4_OVER_6 / 6
            near = [np.abs(ties / (factor * scale[:, None]) - 1).min(axis=1) < 1e-6 for factor in (1, 1.5)]
            assert (near[0] | near[1]).all(), row.name
            blocks, worse = blocks + len(wrong), worse + wrong.sum()
    assert worse < blocks / 1000


def test_a_searched_scale_of_fp8_is_no_worse(tmp_path):
    for recipe in ("super", "ultra"):
        quantize("tiny", tmp_path / recipe, recipe_of(recipe))
    old, plain, searched = (
        Checkpoint.open(each) for each in ("tiny", tmp_path / "super", tmp_path / "ultra")
    )
    larger = 0
    for row in table(old.config):
        if row.role == "mamba":
            exact = old.read(row.name).astype(np.float32)
            found = [each.read(row.name) for each in (plain, searched)]
            errors = [np.square(each.dequantize() - exact).sum() for each in found]
            larger += found[1].scale > found[0].scale
            assert errors[1] <= errors[0] * (1 + 1e-3), row.name  # amax of the larger is rounded to bfloat16
    assert 0 < larger < 8


@pytest.mark.parametrize("recipe", ["nvfp4", "ultra", "fp8"])
def test_the_copy_generates(recipe, tmp_path):
    quantize("tiny", tmp_path / "out", recipe_of(recipe))
    engine = refengine.load(tmp_path / "out")
    text = engine.complete(TEXT, max_tokens=20, temperature=0)
    assert len(text) > 20 and text.isascii()


def test_files_are_cut_at_a_size_and_have_an_index(model, tmp_path):
    quantize(model, tmp_path / "one", recipe_of("nvfp4"))
    quantize(model, tmp_path / "more", recipe_of("nvfp4"), shard=20_000, strip=100)
    shards = sorted((tmp_path / "more").glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "more" / STATE).exists()
    one, more = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "more")
    for row in table(CFG):
        assert one.stored[row.name].raw == more.stored[row.name].raw
    with safe_open(shards[0], "np") as file:
        assert file.keys()


def test_it_goes_on_after_a_stop(model, tmp_path, monkeypatch):
    """Wherever it stops, no partial file counts as whole, and the result is the same."""
    quantize(model, tmp_path / "whole", recipe_of("ultra"), shard=20_000)
    wanted, out = files(tmp_path / "whole"), tmp_path / "out"
    calls, stops = [], {5 * n * (n + 1) // 2 for n in range(1, 12)}  # after 5, 10, 15, ... more
    put = module._put

    def stopping(*args):
        calls.append(args[1].row.name)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return put(*args)

    monkeypatch.setattr(module, "_put", stopping)
    for _ in range(60):
        try:
            found = quantize(model, out, recipe_of("ultra"), shard=20_000)
            break
        except KeyboardInterrupt:
            with pytest.raises(InputError):
                Checkpoint.open(out)
    assert files(out) == wanted and len(calls) > 22 and found["routed_expert"]["matrices"] == 18


def test_a_file_that_was_removed_after_a_stop_is_written_again(model, tmp_path, monkeypatch):
    quantize(model, tmp_path / "whole", recipe_of("nvfp4"), shard=20_000)
    out = tmp_path / "out"

    def stopping(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_finish", stopping)
        quantize(model, out, recipe_of("nvfp4"), shard=20_000)
    min(out.glob("model-*.safetensors")).unlink()
    quantize(model, out, recipe_of("nvfp4"), shard=20_000)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half(model, tmp_path):
    out = tmp_path / "out"
    script = (
        "import time; from pathlib import Path; from refengine.quantize import quantize, recipe_of, write;"
        f"put, second = write._put, lambda: list(Path({str(out)!r}).glob('model-00002*'));"
        "write._put = lambda *args: (second() and time.sleep(600), put(*args))[1];"
        f"quantize({str(model)!r}, {str(out)!r}, recipe_of('nvfp4'), shard=20_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    while not list(out.glob("model-00002*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(InputError):
        Checkpoint.open(out)
    quantize(model, out, recipe_of("nvfp4"), shard=20_000)
    quantize(model, tmp_path / "whole", recipe_of("nvfp4"), shard=20_000)
    left = {name: raw for name, raw in files(out).items() if not name.endswith(".partial")}
    assert left == files(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_the_model_is_as_it_was(model, tmp_path, monkeypatch):
    before = files(model)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_put", full)
    with pytest.raises(
        InputError, match=r"cannot write .*: No space left on device; the same command goes on"
    ):
        quantize(model, tmp_path / "out", recipe_of("nvfp4"))
    assert files(model) == before and set(files(tmp_path / "out")) == {STATE}


def refused(model, out, recipe="nvfp4"):
    with pytest.raises(InputError) as error:
        quantize(model, out, recipe_of(recipe) if isinstance(recipe, str) else recipe)
    return str(error.value)


def test_the_model_itself_is_not_written_over(model):
    before = files(model)
    assert "is the model itself" in refused(model, model) and files(model) == before


def test_other_files_are_not_written_over(model, tmp_path):
    other = random_checkpoint(tmp_path / "other", CFG, 1)
    before = files(other)
    assert (
        "holds config.json already: give a new directory" in refused(model, other) and files(other) == before
    )
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(model, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "holds a.txt already: give a new directory" in refused(model, tmp_path / "notes")
    assert refused(model, tmp_path / "file" / "out").endswith("Not a directory")


def test_the_name_of_the_new_directory_is_not_empty(model):
    run = CliRunner().invoke(command, [str(model), ""])
    assert isinstance(run.exception, InputError) and "name of the new directory is empty" in str(
        run.exception
    )


def test_a_part_of_another_recipe_is_not_gone_on_with(model, tmp_path, monkeypatch):
    def stop(source, path, *args):
        if path.name.startswith("model-00002"):
            raise KeyboardInterrupt
        return write(source, path, *args)

    write = module._write
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", stop)
        patched.setattr(module.quantize, "__kwdefaults__", module.quantize.__kwdefaults__ | {"shard": 20_000})
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", recipe_of("nvfp4"))
    assert "a part of another model or recipe" in refused(model, tmp_path / "out", "fp8")
    for damaged in ("{", "[]", '{"errors": 5}', '{"largest": []}'):
        (tmp_path / "out" / STATE).write_text(damaged)
        assert "is damaged" in refused(model, tmp_path / "out")


def test_a_packed_model_is_not_packed_again(model, tmp_path):
    quantize(model, tmp_path / "out", recipe_of("fp8"))
    assert "is packed already" in refused(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_columns_that_are_no_whole_blocks_are_named(tmp_path):
    from tests.support.checkpoints import CONFIGS as SMALL

    path = random_checkpoint(tmp_path / "model", SMALL["dense"])
    assert "columns, which are not whole blocks of 16" in refused(path, tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    from refengine.checkpoint.random_values import random_values
    from refengine.checkpoint.write import write

    values = random_values(CFG)

    def damaged(row):
        out = values(row)
        if row.key == "mixer.in_proj.weight":
            out[3, 4] = value
        return out

    write(tmp_path / "model", CFG, damaged)
    assert "in_proj.weight of" in refused(tmp_path / "model", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_recipe_may_be_a_file(model, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[roles]\nmamba = "nvfp4"\n[names]\n"backbone.layers.1.*o_proj*" = "mxfp8"\n"lm_head*" = "fp8"\n'
    )
    quantize(model, tmp_path / "out", recipe_of(str(path), four_over_six=True))
    found = Checkpoint.open(tmp_path / "out")
    kinds = {name: at.dtype for name, at in found.stored.items() if at.dtype in ("NVFP4", "FP8", "MXFP8")}
    assert set(kinds.values()) == {"NVFP4", "FP8", "MXFP8"} and len(kinds) == 4 and not found.notes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[roles", "is not a TOML file"),
        ("[layers]\n", "'layers', which is neither"),
        ("roles = 3", "where a table of formats is expected"),
        ('[roles]\nmamba = "int4"', "the format 'int4', which is none of nvfp4"),
        ('[roles]\nconv = "fp8"', "the role 'conv', which is none of mamba"),
        ("", "leaves every weight"),
        ('[names]\n"*norm*" = "fp8"', "is not a matrix"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text, sentence, model, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        plan(Checkpoint.open(model), recipe_of(str(path)))
    assert sentence in str(error.value)


def test_an_unknown_recipe_is_named():
    with pytest.raises(InputError, match="there is no recipe 'int4'; there is nvfp4, w4a16"):
        recipe_of("int4")
    with pytest.raises(InputError, match=r"cannot read no\.toml"):
        recipe_of("no.toml")


def test_four_over_six_of_a_recipe_without_nvfp4_is_refused():
    for name in ("fp8", "mxfp8", "w4a8"):
        with pytest.raises(InputError, match="packs nothing in NVFP4"):
            recipe_of(name, four_over_six=True)
    assert "four_over_six" in recipe_of("ultra", four_over_six=True).roles.values()


def test_zeros_are_written_so_that_every_reader_reads_zeros(tmp_path):
    from refengine.checkpoint.random_values import random_values
    from refengine.checkpoint.write import write

    values = random_values(CFG)
    write(tmp_path / "model", CFG, lambda row: values(row) * (0 if row.precision == "matrix" else 1))
    for recipe in ("nvfp4", "ultra", "fp8", "mxfp8"):
        quantize(tmp_path / "model", tmp_path / recipe, recipe_of(recipe))
        found = Checkpoint.open(tmp_path / recipe).read("backbone.layers.2.mixer.experts.0.up_proj.weight")
        assert (found.dequantize() == 0).all()
        shutil.rmtree(tmp_path / recipe)


def test_the_command_prints_errors_by_role(model, tmp_path):
    run = CliRunner().invoke(command, [str(model), str(tmp_path / "a"), "--recipe", "ultra"])
    assert run.exit_code == 0 and "4/6 gains" in run.output and "routed_expert" in run.output
    run = CliRunner().invoke(command, [str(model), str(tmp_path / "b"), "--json"])
    assert json.loads(run.stdout)["mamba"]["bits"] == pytest.approx(4.5, abs=0.01)


def test_strips_change_nothing(model, tmp_path):
    quantize(model, tmp_path / "a", recipe_of("ultra"), strip=1)
    quantize(model, tmp_path / "b", recipe_of("ultra"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_model_in_float16_is_quantized_too(tmp_path):
    random_checkpoint(tmp_path / "model", CFG, dtype="F16")
    quantize(tmp_path / "model", tmp_path / "out", recipe_of("fp8"))
    exact = Checkpoint.open(tmp_path / "model").read("backbone.layers.0.mixer.in_proj.weight")
    found = Checkpoint.open(tmp_path / "out").read("backbone.layers.0.mixer.in_proj.weight")
    assert np.abs(found.dequantize(ml_dtypes.bfloat16) - exact).max() < 0.04 * np.abs(exact).max()
