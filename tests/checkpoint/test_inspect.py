"""`refengine inspect` names its model as an argument or as every other command does, and shows the notes."""

import json

from click.testing import CliRunner

from refengine.cli.inspect import inspect
from tests.support.checkpoints import CONFIGS, alter_json, random_checkpoint


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
