"""`refengine inspect` takes its model as an argument or as every other command does, and prints the notes."""

import json

from click.testing import CliRunner

from refengine.cli.inspect import inspect
from refengine.spec.config import NAME_OF
from refengine.spec.tensors import parameters, table
from tests.support.checkpoints import CONFIGS, alter_json, random_checkpoint
from tests.support.packed import CFG, packed_checkpoint


def test_the_model_is_an_argument_or_an_option_but_not_both(tmp_path):
    path = str(random_checkpoint(tmp_path, CONFIGS["dense"]))
    run = CliRunner().invoke
    texts = [run(inspect, args).output for args in ([path], ["-m", path], ["--model", path])]
    assert texts[0].startswith(path) and len(set(texts)) == 1
    assert "M*" in run(inspect, []).output, "the embedded model"
    both = run(inspect, [path, "-m", path])
    assert both.exit_code == 2 and "give the model once" in both.output


def test_notes_are_shown(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["dense"])
    alter_json(tmp_path / "config.json", shiny=1)
    run = CliRunner().invoke
    assert (
        "note          config.json has keys that refengine does not know: 'shiny'"
        in run(inspect, [str(tmp_path)]).output
    )
    assert "'shiny'" in json.loads(run(inspect, [str(tmp_path), "--json"]).output)["notes"][0]


def test_precision_is_shown_by_role_and_in_sum(tmp_path):
    run, path = CliRunner().invoke, str(packed_checkpoint(tmp_path))
    found = json.loads(run(inspect, [path, "--json"]).output)
    experts = found["roles"]["routed_expert"]
    assert (
        experts["dtypes"] == {"NVFP4": 2 * CFG.n_routed_experts}
        and found["roles"]["mtp routed_expert"]["dtypes"]
    )
    each = 96 * 32 * 4.5 / 8 + 4  # codes, scales, and the scale of all
    assert experts["bytes"] == 2 * CFG.n_routed_experts * each
    share = CFG.num_experts_per_tok / CFG.n_routed_experts
    others = sum(p["bytes"] for role, p in found["roles"].items() if not role.startswith("mtp "))
    others -= experts["bytes"] + found["roles"]["embedding"]["bytes"]
    assert found["bytes_of_a_token"] == round(others + share * experts["bytes"] + CFG.hidden_size * 2)
    text = run(inspect, [path]).output
    assert f"{8 * found['bytes'] / parameters(table(CFG)):.2f} bits an element" in text
    assert "   4.51  18 NVFP4" in text and "   8.00  2 FP8" in text


def test_precision_is_shown_by_layer_and_adds_up(tmp_path):
    run, path = CliRunner().invoke, str(packed_checkpoint(tmp_path))
    found = json.loads(run(inspect, [path, "--json"]).output)
    assert [part["kind"] for name, part in found["blocks"].items() if name.startswith("layers.")] == [
        NAME_OF[kind] for kind in CFG.layers
    ]
    for total in ("tensors", "parameters", "bytes"):
        assert sum(part[total] for part in found["blocks"].values()) == found[total]
    lines = run(inspect, [path, "--layers"]).output.splitlines()
    assert sum(line.startswith(("layers.", "mtp.layers.")) for line in lines) == len(
        CFG.layers + CFG.mtp_layers
    )
