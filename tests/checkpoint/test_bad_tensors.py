"""Files whose tensors do not match config.json are refused: missing, extra or different tensors."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import CONFIGS, add, alter, alter_json, random_checkpoint, refusal, rename


@pytest.fixture
def weights(tmp_path) -> Path:
    """Return the only file of a good checkpoint."""
    return random_checkpoint(tmp_path, CONFIGS["latent"]) / "model.safetensors"


def test_the_first_missing_tensor_is_named_and_the_others_counted(weights):
    rename(weights, lambda name: None if ".k_proj." in name or ".experts.7." in name else name)
    said = refusal(weights.parent)
    assert "lacks the tensor backbone.layers.1.mixer.experts.7.up_proj.weight and 4 more" in said


def test_half_a_prediction_head_is_refused(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["head"])
    rename(tmp_path / "model.safetensors", lambda name: None if name.startswith("mtp.layers.1") else name)
    assert "lacks the tensor mtp.layers.1.norm.weight and" in refusal(tmp_path)


def test_a_tensor_that_the_model_does_not_have_is_refused(weights):
    for name in ("backbone.layers.0.mixer.q_norm.weight", "backbone.layers.9.norm.weight"):
        add(weights, name, np.ones(26, np.float32), "F32")
    said = refusal(weights.parent)
    assert "q_norm.weight' and 1 more, which the model of config.json does not have" in said


def test_an_expert_may_not_come_alone_and_in_a_stack(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["latent"], stacked=True) / "model.safetensors"
    add(path, "backbone.layers.1.mixer.experts.2.up_proj.weight", np.ones((13, 20), np.float32), "F32")
    assert "name the same tensor" in refusal(tmp_path)


def test_a_stack_of_too_few_experts_is_refused(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["latent"], stacked=True)
    alter_json(tmp_path / "config.json", n_routed_experts=12)
    assert "[9, 26], where config.json calls for [12, 26]" in refusal(tmp_path)


def test_two_spellings_of_one_name_are_refused(weights):
    add(weights, "model.norm_f.weight", np.ones(26, np.float32), "F32")
    assert "name the same tensor" in refusal(weights.parent)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2", "input_scale"])
def test_scales_of_packed_weights_are_not_ignored(name, weights):
    add(weights, f"backbone.layers.0.mixer.in_proj.{name}", np.ones((), np.float32), "F32")
    said = refusal(weights.parent)
    assert f"in_proj.{name}', a scale for packed weights, but no weight is packed" in said


OTHERS = "is quantized in a way that is not supported: 'backbone.layers.0.mixer.in_proj."
PACKED = {
    "NVFP4": ("mixer.in_proj.weight", "U8", "has the shape [24], where its weights call for a matrix"),
    "FP8": ("mixer.in_proj.weight", "F8_E4M3", "has the shape [24], where its weights call for a matrix"),
    "GPTQ": ("mixer.in_proj.qweight", "I32", OTHERS + "qweight' is of AWQ"),
    "compressed-tensors": (
        "mixer.in_proj.weight_packed",
        "I32",
        OTHERS + "weight_packed' is of compressed-tensors",
    ),
    "mlx": ("mixer.in_proj.weight", "U32", OTHERS + "weight' is U32"),
}


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_called_so_whatever_the_metadata_says(kind, scales, weights):
    """Although they are small, they are not reported as an incomplete download."""
    (name, dtype, sentence), old = PACKED[kind], "backbone.layers.0.mixer.in_proj.weight"
    keep = {"A_log", "conv1d.weight", "norm_f.weight"}
    rename(
        weights, lambda each: each if any(each.endswith(ending) for ending in keep) and each != old else None
    )
    add(weights, f"backbone.layers.0.{name}", np.ones(24, np.uint8), dtype if dtype[-2:] != "32" else "U8")
    alter(weights, lambda header, data: (as_words(header, f"backbone.layers.0.{name}", dtype), data))
    if scales:
        add(weights, "backbone.layers.0.mixer.in_proj.weight_scale", np.ones((), np.float32), "F32")
    assert sentence in refusal(weights.parent)


@pytest.mark.parametrize(
    ("name", "dtype"), [("attention_mask", "U8"), ("in_proj.weight", "I64"), ("A_log", "I8")]
)
def test_a_tensor_of_another_kind_is_not_called_packed(name, dtype, weights):
    """A mask of bytes or a damaged dtype is refused with another sentence."""
    name = f"backbone.layers.0.mixer.{name}"
    rename(weights, lambda each: None if each == name else each)
    add(weights, name, np.ones(8, np.uint8), "U8")
    size = 1 if dtype == "I64" else 8
    alter(weights, lambda header, data: (retyped(header, name, dtype, size), data))
    said = refusal(weights.parent)
    assert repr(name) in said and "quantized" not in said


def retyped(header, name, dtype, size):
    header[name] |= {"dtype": dtype, "shape": [size]}
    return header


def as_words(header, name, dtype):
    if dtype[-2:] == "32":
        header[name] |= {"dtype": dtype, "shape": [6]}
    return header
