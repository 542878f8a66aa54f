"""Packed weights that are incomplete, damaged or of another tool are refused in one sentence."""

import numpy as np
import pytest

import refengine
from refengine.spec.config import InputError
from tests.support.checkpoints import add, alter, alter_json, parts, refusal, rename
from tests.support.packed import all_in, mixed, packed_checkpoint

BASE = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.2.mixer.experts.3.up_proj"


@pytest.fixture(params=["NVFP4", "FP8", "MXFP8"])
def packed(request, tmp_path):
    """Return the kind of all matrices, and the file that holds them."""
    return request.param, packed_checkpoint(tmp_path, all_in(request.param)) / "model.safetensors"


def replace(path, name, array, dtype):
    """Replace one tensor by another."""
    rename(path, lambda each: None if each == name else each)
    add(path, name, np.asarray(array), dtype)


def scale_of(path, name):
    header, data = parts(path)
    begin, end = header[name]["data_offsets"]
    return np.frombuffer(data[begin:end], np.uint8).reshape(header[name]["shape"]).copy(), header[name][
        "dtype"
    ]


def loaded(path) -> str:
    """Return the sentence with which loading is refused."""
    with pytest.raises(InputError) as refused:
        refengine.load(path)
    return str(refused.value)


def test_missing_scales_are_named(packed):
    kind, path = packed
    for end in ["weight_scale"] + ["weight_scale_2"] * (kind == "NVFP4"):
        original = path.read_bytes()
        rename(path, lambda name, end=end: None if name == f"{EXPERT}.{end}" else name)
        said = refusal(path.parent)
        assert f"'{EXPERT}.weight'" in said and f"but '{EXPERT}.{end}' is missing" in said
        path.write_bytes(original)


def test_a_scale_of_another_shape_is_named(packed):
    kind, path = packed
    array, dtype = (
        np.ones((64, 3) if kind != "FP8" else (2,), np.uint8 if kind != "FP8" else np.float32),
        "F32",
    )
    dtype = {"NVFP4": "F8_E4M3", "MXFP8": "U8", "FP8": "F32"}[kind]
    replace(path, f"{BASE}.weight_scale", array, dtype)
    said = refusal(path.parent)
    assert f"{BASE}.weight_scale' in" in said and f"has the shape {list(array.shape)}" in said


def test_a_scale_of_another_dtype_is_named(packed):
    kind, path = packed
    raw, _ = scale_of(path, f"{BASE}.weight_scale") if kind != "FP8" else (np.ones((), np.uint16), "")
    replace(path, f"{BASE}.weight_scale", raw, "I8" if kind != "FP8" else "BF16")
    said = refusal(path.parent)
    assert f"{BASE}.weight_scale' in" in said and "has the dtype" in said


def test_an_nvfp4_weight_beside_a_scale_in_bfloat16(tmp_path):
    path = packed_checkpoint(tmp_path) / "model.safetensors"
    replace(path, f"{EXPERT}.weight_scale", np.ones((96, 2), np.uint16), "BF16")
    said = refusal(tmp_path)
    assert f"'{EXPERT}.weight_scale' in {path} has the dtype BF16, where its weights call for F8_E4M3" in said


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
@pytest.mark.parametrize("kind", ["NVFP4", "FP8"])
def test_a_scale_of_a_matrix_that_means_nothing_is_named(kind, value, tmp_path):
    path = packed_checkpoint(tmp_path, all_in(kind)) / "model.safetensors"
    name = f"{EXPERT}.weight_scale" + ("_2" if kind == "NVFP4" else "")
    replace(path, name, np.array(value, np.float32), "F32")
    said = loaded(tmp_path)
    assert f"the scale '{name}' is {value:g}" in said and "download it again" in said


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_a_scale_of_inputs_that_means_nothing_is_named_where_inputs_are_packed(value, tmp_path):
    path = packed_checkpoint(tmp_path, all_in("NVFP4")) / "model.safetensors"
    for base, each in ((BASE, 0.01), (EXPERT, value)):
        add(path, f"{base}.input_scale", np.array(each, np.float32), "F32")
    with pytest.raises(InputError, match=rf"the scale '{EXPERT}\.input_scale' is {value:g}"):
        refengine.load(tmp_path, packed_inputs=True)
    assert refengine.load(tmp_path).logits([5]).any()  # otherwise no scale of inputs is read


@pytest.mark.parametrize(("code", "what"), [(0x7F, "a NaN"), (0xFF, "a NaN"), (0x81, "a negative number")])
def test_a_scale_of_a_block_that_means_nothing_is_named(code, what, tmp_path):
    path = packed_checkpoint(tmp_path, all_in("NVFP4")) / "model.safetensors"
    scale, dtype = scale_of(path, f"{EXPERT}.weight_scale")
    scale[5, 1] = code
    replace(path, f"{EXPERT}.weight_scale", scale, dtype)
    assert f"the scale '{EXPERT}.weight_scale' holds {what}" in loaded(tmp_path)


def test_an_exponent_that_is_no_number_is_named(tmp_path):
    path = packed_checkpoint(tmp_path, all_in("MXFP8")) / "model.safetensors"
    scale, dtype = scale_of(path, f"{BASE}.weight_scale")
    scale[5, 1] = 255
    replace(path, f"{BASE}.weight_scale", scale, dtype)
    assert f"the scale '{BASE}.weight_scale' holds a NaN" in loaded(tmp_path)


def test_zeros_as_modelopt_spells_them_are_read(tmp_path):
    """In a matrix of zeros, scale_2 is 0, other scales are NaN, and codes are 7 (in FP8: NaN)."""
    path = packed_checkpoint(tmp_path) / "model.safetensors"
    codes, dtype = scale_of(path, f"{EXPERT}.weight")
    replace(path, f"{EXPERT}.weight", np.full_like(codes, 0x77), dtype)
    scale, dtype = scale_of(path, f"{EXPERT}.weight_scale")
    replace(path, f"{EXPERT}.weight_scale", np.full_like(scale, 0x7F), dtype)
    replace(path, f"{EXPERT}.weight_scale_2", np.zeros((), np.float32), "F32")
    codes, dtype = scale_of(path, f"{BASE}.weight")
    replace(path, f"{BASE}.weight", np.full_like(codes, 0xFF), dtype)
    replace(path, f"{BASE}.weight_scale", np.zeros((), np.float32), "F32")
    model = refengine.load(tmp_path).model
    assert (model.weights["layers.2"]["mixer"]["experts"][3][0].dequantize() == 0).all()
    assert (model.weights["layers.0"]["mixer"]["in_proj.weight"].dequantize() == 0).all()


def test_an_odd_width_is_named(tmp_path):
    path = packed_checkpoint(tmp_path, all_in("NVFP4")) / "model.safetensors"
    replace(path, f"{BASE}.weight", np.ones((5, 31), np.uint8), "U8")
    replace(path, f"{BASE}.weight_scale", np.ones((5, 4), np.uint8), "F8_E4M3")
    assert f"'{BASE}.weight_scale'" in refusal(tmp_path) and "equal blocks of [5, 62]" in refusal(tmp_path)


def test_a_matrix_of_another_size_is_named(tmp_path):
    path = packed_checkpoint(tmp_path, all_in("NVFP4")) / "model.safetensors"
    replace(path, f"{EXPERT}.weight", np.ones((96, 32), np.uint8), "U8")
    replace(path, f"{EXPERT}.weight_scale", np.ones((96, 4), np.uint8), "F8_E4M3")
    assert (
        f"'{EXPERT}.weight' in {path} has the shape [96, 64], where config.json calls for [96, 32]"
        in refusal(tmp_path)
    )


def test_scales_beside_a_plain_weight_are_refused(tmp_path):
    path = packed_checkpoint(tmp_path, mixed) / "model.safetensors"
    add(path, "backbone.layers.1.mixer.q_proj.weight_scale", np.ones((), np.float32), "F32")
    assert "but 'backbone.layers.1.mixer.q_proj.weight' is not packed" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("end", "tool"),
    [
        ("weight_packed", "compressed-tensors"), ("qweight", "AWQ"), ("g_idx", "GPTQ"),
        ("SCB", "bitsandbytes"),
        ("weight.absmax", "bitsandbytes"), ("weight_scale_inv", "square blocks"),
        ("pre_quant_scale", "the AWQ method"),
    ],
)  # fmt: skip
def test_other_tools_are_named(end, tool, tmp_path):
    path = packed_checkpoint(tmp_path, mixed) / "model.safetensors"
    add(path, f"{BASE}.{end}", np.ones((2, 2), np.float32), "F32")
    said = refusal(tmp_path)
    assert f"'{BASE}.{end}' is of " in said and tool in said and "those of modelopt" in said


def test_the_tool_that_config_json_names_is_in_the_sentence(tmp_path):
    """Its tensors may have modelopt's names, as in FP8 of compressed-tensors."""
    path = packed_checkpoint(tmp_path, all_in("FP8")) / "model.safetensors"
    replace(path, f"{BASE}.weight_scale", np.ones((5, 1), np.uint16), "BF16")
    alter_json(tmp_path / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    said = refusal(tmp_path)
    assert f"{BASE}.weight_scale' in" in said and "has the dtype BF16" in said
    assert said.endswith("; config.json names the tool 'compressed-tensors'")
    alter_json(tmp_path / "config.json", quantization_config={"quant_method": "modelopt"})
    assert "names the tool" not in refusal(tmp_path)


def test_a_stack_of_packed_experts_is_refused(tmp_path):
    path = packed_checkpoint(tmp_path, mixed) / "model.safetensors"
    add(path, "backbone.layers.2.mixer.experts.up_proj", np.ones((9, 2, 2), np.uint8), "U8")
    assert "is a stack of packed experts" in refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    path = packed_checkpoint(tmp_path, mixed) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "is truncated" in refusal(tmp_path)


def test_dtypes_that_no_kind_has_are_named(tmp_path):
    path = packed_checkpoint(tmp_path, mixed) / "model.safetensors"

    def change(header, data):
        header[f"{BASE}.weight"]["dtype"] = "F8_E5M2"
        return header, data

    alter(path, change)
    assert f"'{BASE}.weight' is F8_E5M2" in refusal(tmp_path)
