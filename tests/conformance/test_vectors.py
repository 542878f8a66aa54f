"""The output of `refengine vectors` is read back and judged, also by programs in C and JavaScript."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from refengine.cli.vectors import vectors
from refengine.conformance.vectors import check_vector
from refengine.conformance.vectors import files as vectors_files
from refengine.conformance.vectors.files import SHIPPED, manifest
from refengine.conformance.vectors.make import PLANS, drawn
from refengine.spec.config import InputError
from refengine.spec.ops import numpy_backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "vectors"
SCANS_AND_ROUTES = [e["name"] for e in manifest(SHIPPED) if e["operation"] in ("ssd_scan", "route")]


def run(*words):
    """Return the output of `refengine vectors` and its exit code; our errors are raised."""
    done = CliRunner().invoke(vectors, [str(word) for word in words])
    if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output, done.exit_code


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return a set of the shipped vectors, and a folder of outputs that NumPy computed in float32."""
    folder = tmp_path_factory.mktemp("vectors")
    run("write", folder / "set")
    run("compute", folder / "set", "--outputs", folder / "outputs")
    return folder / "set", folder / "outputs"


def test_the_written_set_is_the_shipped_one(sets):
    for path in SHIPPED.rglob("*.*"):
        assert (sets[0] / path.relative_to(SHIPPED)).read_bytes() == path.read_bytes(), path.name


def test_computed_outputs_are_right(sets):
    text, code = run("check", sets[0], "--outputs", sets[1], "--complete")
    count = len(manifest(SHIPPED))
    assert code == 0 and text.endswith(f"{count} of {count} cases right in float32\n") and "FAIL" not in text


def test_a_wrong_output_fails_by_name(sets, tmp_path):
    shutil.copytree(sets[1], tmp_path / "outputs")
    path = tmp_path / "outputs" / "ssd_scan" / "small-steps.safetensors"
    found = vectors_files.load(path)
    vectors_files.save(path, found | {"y": found["y"] + 1e-3}, {})
    (tmp_path / "outputs" / "chat" / "tiny.json").write_text("[]")
    text, code = run("check", sets[0], "--outputs", tmp_path / "outputs")
    failed = [line.split()[1] for line in text.splitlines() if line.startswith("FAIL")]
    assert code == 1 and failed == ["ssd_scan/small-steps", "chat/tiny"]
    text, code = run("check", sets[0], "--outputs", tmp_path / "outputs", "--op", "route", "--json")
    assert code == 0 and all(row["passed"] for row in json.loads(text))


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "truncated", "another dtype"])
def test_damaged_outputs_are_a_sentence_each(sets, tmp_path, damage):
    name = "route/bias"
    path = tmp_path / f"{name}.safetensors"
    right = vectors_files.load(sets[1] / f"{name}.safetensors")["weights"]
    arrays = {
        "missing": {"other": right},
        "shape": {"weights": right[:1]},
        "nan": {"weights": right * np.nan},
        "another dtype": {"weights": right.astype(np.int16)},
    }
    vectors_files.save(path, arrays.get(damage, {"weights": right}), {})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    text, code = run("check", sets[0], "--outputs", tmp_path)
    (line,) = [line for line in text.splitlines() if name in line]
    assert code == 1 and line.startswith("FAIL")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["write", "{tmp}/new", "--op", "rope"], "there are no vectors of 'rope'"),
        (["check", "{tmp}", "--outputs", "{tmp}"], "manifest.json does not exist"),
        (["check", "{set}", "--outputs", "{tmp}/no"], "is not a directory"),
        (["check", "{set}", "--outputs", "{tmp}"], "holds no outputs"),
        (["write", "{tmp}/file"], "is not a directory"),
        (["write", "{tmp}"], "is not empty"),
        (["compute", "{set}", "--outputs", "{set}"], "holds vectors, which outputs would overwrite"),
        (["compute", "{set}", "--outputs", "{set}/../set"], "holds vectors, which outputs would overwrite"),
        (["check", "{set}", "--outputs", "{set}"], "holds vectors, which are inputs"),
        (["compute", "{set}", "--outputs", "{tmp}/file"], "is not a directory"),
        (["compute", "{set}", "--outputs", "{tmp}/new", "--dtype", "bf16"], "^the numpy backend computes in"),
    ],
)
def test_wrong_input_is_one_sentence(sets, tmp_path, words, sentence):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=sentence):
        run(*(word.format(tmp=tmp_path, set=sets[0]) for word in words))


def test_a_manifest_of_another_format_is_refused(tmp_path):
    for text in ("[]", "{}", '{"format": "refengine vectors 9", "cases": []}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="is not the manifest"):
            manifest(tmp_path)


def case_of(folder, **changes):
    """Write a set of one case, route/bias, with changes to its entry in the manifest; None removes a key."""
    run("write", folder, "--op", "route/bias")
    (described,) = manifest(folder)
    changed = {key: value for key, value in (described | changes).items() if value is not None}
    value = {"format": vectors_files.FORMAT, "cases": [changed]}
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder / "route/bias.safetensors"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"operation": "rotary"}, "is of 'rotary', which is no operation"),
        ({"operation": "ssd_scan"}, "cannot be computed"),
        ({"operation": "chat"}, "is of 'chat', which is no operation"),
        ({"operation": None}, "case 0 has no operation"),
        ({"name": 3}, "case 0 has no name"),
        ({"name": "../../away"}, "the name '../../away' leads out of the directory"),
        ({"file": "/etc/hostname"}, "the file '/etc/hostname' leads out of the directory"),
        ({"outputs": None}, "has no outputs"),
        ({"outputs": {"y": {"expected": "out.y", "terms": 3}}}, "lacks 'out.y'"),
        ({"config": None}, "cannot be computed"),
    ],
)
def test_a_manifest_that_cannot_be_computed_is_one_sentence(tmp_path, changes, sentence):
    case_of(tmp_path / "set", **changes)
    with pytest.raises(InputError, match=sentence) as refused:
        run("compute", tmp_path / "set", "--outputs", tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1


def test_a_set_without_cases_or_inputs_is_one_sentence(tmp_path):
    path = case_of(tmp_path / "set")
    arrays = vectors_files.load(path)
    vectors_files.save(path, {key: a for key, a in arrays.items() if not key.startswith("in.")}, {})
    with pytest.raises(InputError, match="the case 'route/bias' cannot be computed: it lacks 'in"):
        run("compute", tmp_path / "set", "--outputs", tmp_path / "out")
    empty = {"format": vectors_files.FORMAT, "cases": []}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(empty))
    for words in (["compute"], ["check"]):
        with pytest.raises(InputError, match="lists no case"):
            run(*words, tmp_path / "set", "--outputs", tmp_path)


def test_drawn_cases_of_two_operations_have_two_names():
    names = [drawn(operation, 0, 0).name for operation in PLANS]
    assert len(names) == len(set(names))


def test_writing_some_cases_into_a_set_keeps_the_others(tmp_path):
    run("write", tmp_path, "--op", "route", "--op", "mlp")
    before = [e["name"] for e in manifest(tmp_path)]
    text, _ = run("write", tmp_path, "--op", "mlp", "--cases", 1)
    assert "were there before" in text
    after = [e["name"] for e in manifest(tmp_path)]
    assert set(after) == {*before, "mlp/seed-0-0", "mlp/mixer-seed-0-0"} and len(after) == len(set(after))


@pytest.mark.parametrize("operation", PLANS)
def test_drawn_cases_repeat_by_their_seed(operation, tmp_path):
    first, again, other = drawn(operation, 5, 0), drawn(operation, 5, 0), drawn(operation, 5, 1)
    assert first.arrays.keys() == again.arrays.keys() and first.config == again.config
    assert all(np.array_equal(a, again.arrays[key]) for key, a in first.arrays.items())
    assert other.name != first.name and (other.seed != first.seed)
    vectors_files.write(tmp_path, [first])
    (read,) = vectors_files.vectors(tmp_path)
    assert read.outputs == first.outputs and read.constants == first.constants
    assert all(np.array_equal(a, read.arrays[key]) for key, a in first.arrays.items())


@pytest.mark.parametrize("operation", PLANS)
def test_drawn_cases_are_computed_within_their_tolerances(operation, record_property):
    for number in range(4):
        vector = drawn(operation, 11, number)
        for dtype in ("float32", "float64"):
            row = check_vector(vector, numpy_backend(np.dtype(dtype)), dtype)
            assert row.passed and not row.note, row
            record_property("worst error of drawn cases, of what is allowed", row.error / row.allowed)


def test_more_cases_of_one_operation(tmp_path):
    run("write", tmp_path / "set", "--op", "ssd_scan", "--op", "sampling", "--cases", 2, "--seed", 3)
    names = [e["name"] for e in manifest(tmp_path / "set")]
    assert {"ssd_scan/seed-3-0", "ssd_scan/seed-3-1", "sample/seed-3-1", "sample/all"} <= set(names)
    run("compute", tmp_path / "set", "--outputs", tmp_path / "outputs")
    assert run("check", tmp_path / "set", "--outputs", tmp_path / "outputs", "--complete")[1] == 0


def program(tmp_path, language):
    """Return the command of a consumer, which is compiled if necessary."""
    if language == "JavaScript":
        if not (node := shutil.which("node")):
            pytest.skip("node is not installed: apt-get install nodejs")
        return [node, str(TOOLS / "consumer.mjs")]
    if not (cc := shutil.which("cc")):
        pytest.skip("there is no C compiler: apt-get install gcc libc6-dev")
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([cc, *flags, TOOLS / "consumer.c", "-o", tmp_path / "consumer", "-lm"], check=True)
    return [str(tmp_path / "consumer")]


@pytest.mark.parametrize("language, dtype", [("C", "float32"), ("JavaScript", "float64")])
def test_a_program_in_another_language_agrees(sets, tmp_path, language, dtype):
    command, outputs = program(tmp_path, language), tmp_path / "outputs"
    shutil.copytree(sets[1] / "model", outputs / "model")
    for folder in ("ssd_scan", "route"):
        (outputs / folder).mkdir()
    done = subprocess.run([*command, str(sets[0]), str(outputs)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and all(line.startswith("pass") for line in lines), done.stdout + done.stderr
    assert {line.split()[1] for line in lines if "logits" not in line} == set(SCANS_AND_ROUTES)
    assert sum(" logits: " in line for line in lines) == 5
    page = (ROOT / "docs" / "vectors.md").read_text()
    assert all(f"{line.partition(':')[0]}: " in page for line in lines)
    text, code = run(
        "check", sets[0], "--outputs", outputs, "--dtype", dtype, "--op", "ssd_scan", "--op", "route"
    )
    assert code == 0 and f"{len(SCANS_AND_ROUTES)} of {len(SCANS_AND_ROUTES)} cases right" in text


@pytest.mark.parametrize("language", ["C", "JavaScript"])
def test_a_program_in_another_language_sees_wrong_logits(sets, tmp_path, language):
    command, outputs = program(tmp_path, language), tmp_path / "outputs"
    for folder in ("ssd_scan", "route"):
        (outputs / folder).mkdir(parents=True)
    logits = vectors_files.load(sets[1] / "model" / "dense.safetensors")["logits"]
    logits = np.where(np.arange(logits.shape[1])[:, None] == 3, logits + 0.01, logits)
    vectors_files.save(outputs / "model" / "dense.safetensors", {"logits": logits}, {})
    done = subprocess.run([*command, str(sets[0]), str(outputs)], capture_output=True, text=True)
    assert done.returncode == 1 and "FAIL  model/dense logits" in done.stdout


def test_the_programs_are_short_and_need_nothing():
    sources = {path.name: path.read_text() for path in TOOLS.glob("consumer.*")}
    assert sources.keys() == {"consumer.c", "consumer.mjs"}
    assert all(len(text.splitlines()) < 200 for text in sources.values())
    assert "node_modules" not in sources["consumer.mjs"]
    assert all(
        'from "node:' in line for line in sources["consumer.mjs"].splitlines() if "import " in line[:7]
    )
