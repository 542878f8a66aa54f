"""`refengine inspect` describes a model whose weights are not here, or not written yet, as it will be."""

import json
import shutil

import pytest
from click.testing import CliRunner

from refengine.anatomy import anatomy
from refengine.checkpoint import INDEX, Checkpoint
from refengine.checkpoint.planned import of_config, opened
from refengine.cli.inspect import inspect
from refengine.quantize import quantize, recipe_of
from refengine.quantize.write import copied
from refengine.spec.config import Config, InputError
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG
from tools.releases import FILES

SAME = ("tensors", "parameters", "bytes", "bytes_of_a_token", "dtypes", "roles", "blocks")


def told(*args):
    """Return what the command prints, as JSON."""
    result = CliRunner().invoke(inspect, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def without_weights(source, target):
    """Return a directory with the files of a model that are no weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def test_a_configuration_alone_gives_the_sizes_of_the_files(tmp_path):
    bare = without_weights(random_checkpoint(tmp_path / "model", CFG), tmp_path / "bare")
    for there in (bare, bare / "config.json"):
        planned, whole = told(there), told(tmp_path / "model")
        assert [planned[key] for key in SAME] == [whole[key] for key in SAME]
        assert "no weights are here" in planned["notes"][0]


@pytest.mark.parametrize("recipe", ["ultra", "nano", "mxfp8"])
def test_a_recipe_and_an_index_give_the_sizes_of_the_copy(tmp_path, recipe):
    model = random_checkpoint(tmp_path / "model", CFG)
    quantize(model, tmp_path / "copy", recipe_of(recipe), shard=50_000)
    assert (tmp_path / "copy" / INDEX).exists()
    whole = anatomy(Checkpoint.open(tmp_path / "copy"))
    for planned in (
        anatomy(copied(Checkpoint.open(model), recipe_of(recipe))),
        anatomy(copied(opened(without_weights(model, tmp_path / "bare")), recipe_of(recipe))),
        anatomy(opened(without_weights(tmp_path / "copy", tmp_path / "index"))),
    ):
        assert [planned[key] for key in SAME] == [whole[key] for key in SAME]


def test_the_releases_have_the_published_sizes():
    """The sizes of the repositories in bytes, to the precision that is published."""
    for name, recipe, published in (("nano", "nano", 19.3e9), ("ultra", "ultra", 352e9)):
        packed = copied(of_config(Config.from_hf(FILES[name])), recipe_of(recipe))
        assert sum(at.nbytes for at in packed.stored.values()) == pytest.approx(published, rel=0.003)
    ultra = of_config(Config.from_hf(FILES["ultra"]))
    assert sum(at.nbytes for at in ultra.stored.values()) == pytest.approx(1121.05e9, rel=1e-4)


def test_an_index_of_another_size_is_noted(tmp_path):
    bare = without_weights(random_checkpoint(tmp_path / "model", CFG), tmp_path / "bare")
    names = list(Checkpoint.open(tmp_path / "model").stored)
    index = {"metadata": {"total_size": 10**12}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (bare / INDEX).write_text(json.dumps(index))
    assert any("1 TB in all" in note for note in told(bare)["notes"])
    (bare / INDEX).write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        opened(bare)


def test_metadata_of_packed_weights_without_an_index_asks_for_it(tmp_path):
    bare = without_weights(random_checkpoint(tmp_path / "model", CFG), tmp_path / "bare")
    hf = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(hf | {"quantization_config": {"quant_algo": "NVFP4"}}))
    assert any("download it too" in note for note in told(bare)["notes"])


def test_memory_and_bandwidth_bound_what_fits_and_how_fast_it_is(tmp_path):
    args = ("tiny", "--backend", "cpu", "--context", 100)
    facts = told(*args, "--memory", "1GB", "--bandwidth", "20GB/s")["room"]
    state = told(*args)["state"]
    assert facts["memory"] == 10**9 and facts["bandwidth"] == 20 * 10**9
    assert facts["step_bytes"] == (
        told("tiny")["bytes_of_a_token"] + state["ssm_bytes"] + 100 * state["kv_bytes_per_token"]
    )
    run = CliRunner().invoke
    assert "does not fit into 1 KB" in run(inspect, ["tiny", "--memory", "1KB"]).output
    assert "fits into 1 GB" in run(inspect, ["tiny", "--memory", "1GB"]).output
    assert "tokens/s" in run(inspect, ["tiny", "--bandwidth", "measure"]).output
    assert run(inspect, ["tiny", "--bandwidth", "0"]).exit_code == 2


def test_on_a_backend_without_packed_products_the_weights_are_bfloat16(tmp_path):
    for recipe in ("nano", "fp8"):
        args = ("tiny", "--recipe", recipe, "--context", 1)
        backends = ("cpu", "cuda", "torch")
        on = {name: told(*args, "--backend", name)["room"]["weights_bytes"] for name in backends}
        assert on["cuda"] == told("tiny")["bytes"] > on["cpu"] == on["torch"] == told(*args)["bytes"]


def test_a_model_that_is_not_here_is_described_and_not_run(tmp_path):
    bare = without_weights(random_checkpoint(tmp_path / "model", CFG), tmp_path / "bare")
    with pytest.raises(InputError, match="'refengine inspect' tells the sizes"):
        Checkpoint.open(bare)
    with pytest.raises(InputError, match="is not here: download"):
        opened(bare).read("backbone.embeddings.weight")
    (bare / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        opened(bare)
    with pytest.raises(InputError, match="there is no recipe"):
        copied(opened(tmp_path / "model"), recipe_of("none"))
