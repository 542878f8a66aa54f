"""Check that a damaged GGUF file is refused in one sentence that names the fault."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from refengine.text.ids_only import tokenizer_of
from refengine.text.tokenizer import Tokenizer
from tests.support.checkpoints import refusal
from tests.support.gguf import ARRAY, STRING, UINT64, Entry, rewrite

GOOD = Path(__file__).parent / "gguf" / "experts-q8_0.gguf"
ARCH = "nemotron_h_moe"


def keys(**changed):
    """Return a change of keys: `ssm__state_size` is that of the architecture, None removes one."""

    def change(metadata, entries, data):
        names = {name: name.replace("__", ".") for name in changed}
        full = {
            (name if name.startswith(("general.", "tokenizer.", "split.")) else f"{ARCH}.{name}"): changed[
                key
            ]
            for key, name in names.items()
        }
        return {k: v for k, v in (metadata | full).items() if v is not None}, entries, data

    return change


def entry(name: str, /, **changed):
    """Return a change of the header's entry of one tensor."""

    def change(metadata, entries, data):
        return metadata, [at._replace(**changed) if at.name == name else at for at in entries], data

    return change


def without(name: str):
    return lambda metadata, entries, data: (metadata, [at for at in entries if at.name != name], data)


def raw_value(kind: int, body: bytes) -> bytes:
    return struct.pack("<I", kind) + body


REFUSALS = {
    "another architecture": (keys(general__architecture="llama"), "the architecture 'llama'"),
    "no architecture": (keys(general__architecture=None), "names no architecture"),
    "a key of another type": (keys(ssm__state_size="16"), "ssm.state_size = '16' is not a whole number"),
    "a missing size": (keys(ssm__state_size=None), "its metadata lacks ssm_state_size"),
    "a negative size": (keys(ssm__state_size=-16), "ssm_state_size = -16"),
    "layers of several widths": (keys(expert_feed_forward_length=[64, 0, 32]), "several widths"),
    "a list of texts for numbers": (keys(feed_forward_length=["a"]), "neither a whole number nor a list"),
    "another kind of layer": (keys(attention__head_count_kv=[2, 0, 0]), "does not fit the tensors of block"),
    "more blocks than there are": (keys(block_count=5), "no tensors of a known kind of layer in"),
    "an absurd number of blocks": (keys(block_count=2**31), "no number of layers"),
    "several prediction heads": (keys(nextn_predict_layers=2, block_count=3), "more than the one"),
    "soft caps": (keys(attn_logit_softcapping=30.0), "would change what the model computes"),
    "softmax routing": (keys(expert_gating_func=1), "would change what the model computes"),
    "keys and values of two widths": (keys(attention__value_length=8), "is not key_length = 16"),
    "heads that are no parts": (keys(ssm__inner_size=63), "no multiple of ssm.time_step_rank"),
    "groups without a number": (keys(expert_group_count=2, expert_group_used_count=None), "needs expert"),
    "lists within a list": (keys(x=raw_value(ARRAY, struct.pack("<IQ", ARRAY, 1))), "lists within the list"),
    "an unknown type of value": (keys(x=raw_value(77, b"")), "unknown type 77"),
    "a list that is too long": (keys(x=raw_value(ARRAY, struct.pack("<IQ", UINT64, 2**60))), "would have"),
    "a text that is too long": (keys(x=raw_value(STRING, struct.pack("<Q", 2**60))), "within its header"),
    "an alignment": (keys(general__alignment=3), "general.alignment = 3"),
    "an alignment of 0": (keys(general__alignment=0), "general.alignment = 0"),
    "a missing tensor": (without("blk.0.ssm_in.weight"), "no tensors of a known kind of layer in block 0"),
    "a missing norm": (without("output_norm.weight"), "lacks the tensor backbone.norm_f.weight"),
    "a tensor of no known name": (entry("output_norm.weight", name="output_norm.bias"), "lacks the tensor"),
    "an unknown type": (entry("blk.1.attn_v.weight", type=99), "has the type number 99"),
    "integers": (entry("blk.1.attn_v.weight", type=24), "has the type I8"),
    "too many axes": (entry("blk.1.attn_v.weight", dims=(1, 1, 1, 1, 1)), "would have 5 axes"),
    "no axes": (entry("blk.1.attn_v.weight", dims=()), "the impossible shape"),
    "no elements": (entry("blk.1.attn_v.weight", dims=(64, 0)), "the impossible shape"),
    "an absurd size": (entry("blk.1.attn_v.weight", dims=(2**62, 2**62)), "the impossible shape"),
    "broken blocks": (entry("blk.1.attn_v.weight", dims=(33, 32)), "are not blocks of 32"),
    "another shape": (entry("blk.1.attn_v.weight", dims=(32, 64)), "has the shape"),
    "an odd offset": (entry("blk.1.attn_v.weight", offset=33), "the offset 33"),
    "an offset beyond the file": (entry("blk.1.attn_v.weight", offset=2**40), "is truncated"),
    "an absurd offset": (entry("blk.1.attn_v.weight", offset=2**63 + 32), "is truncated"),
    "two tensors in one place": (entry("blk.1.attn_v.weight", offset=0), "bytes that"),
    "a name twice": (entry("output_norm.weight", name="token_embd.weight"), "twice"),
    "a name that is no text": (entry("output_norm.weight", name=b"\xff"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_header_is_refused(case, tmp_path):
    change, sentence = REFUSALS[case]
    assert sentence in refusal(rewrite(GOOD, tmp_path / "x.gguf", change))


RAW = {
    "empty": (lambda raw: b"", "is an empty file"),
    "short": (lambda raw: raw[:20], "too short"),
    "another format": (lambda raw: b"PK\3\4" + raw[4:], "not a GGUF file"),
    "Git LFS": (lambda raw: b"version https://git-lfs", "git lfs pull"),
    "version 1": (lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:], "of version 1"),
    "big-endian": (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "big-endian"),
    "many tensors": (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "tensors"),
    "many keys": (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "keys"),
    "half a header": (lambda raw: raw[:900], "is truncated"),
    "half the data": (lambda raw: raw[: len(raw) - 5000], "is truncated"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_broken_file_is_refused(case, tmp_path):
    change, sentence = RAW[case]
    (tmp_path / "x.gguf").write_bytes(change(GOOD.read_bytes()))
    assert sentence in refusal(tmp_path / "x.gguf")


TOKENIZERS = {
    "another model": (keys(tokenizer__ggml__model="llama"), "its model is 'llama'"),
    "other cuts": (keys(tokenizer__ggml__pre="qwen2"), "its cuts are 'qwen2'"),
    "no cuts": (keys(tokenizer__ggml__pre=None), "its cuts are None"),
    "no tokens": (keys(tokenizer__ggml__tokens=None), "tokens is not a list"),
    "numbers for tokens": (keys(tokenizer__ggml__tokens=[1, 2]), "tokens is not a list"),
    "no merges": (keys(tokenizer__ggml__merges=None), "merges is not a list"),
    "a merge of one": (keys(tokenizer__ggml__merges=["the"]), "is not a pair"),
    "a merge of unknown tokens": (keys(tokenizer__ggml__merges=["zz zz"]), "cannot be rebuilt"),
    "a token twice": (keys(tokenizer__ggml__tokens=["a"] * 64), "the same text"),
    "a token that is no text": (keys(tokenizer__ggml__tokens=[b"\xff"] + ["a"] * 63), "not UTF-8"),
    "kinds of other tokens": (keys(tokenizer__ggml__token_type=[1, 1]), "list of 64 kinds"),
    "a token to add that is not there": (
        keys(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=999), "asks for a token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_when_text_is_asked_for(case, tmp_path):
    change, sentence = TOKENIZERS[case]
    path = rewrite(GOOD, tmp_path / "x.gguf", change)
    Checkpoint.open(path)
    with pytest.raises(InputError, match=sentence):
        Tokenizer.load(path)


def test_a_template_that_is_no_text_is_refused(tmp_path):
    path = rewrite(GOOD, tmp_path / "x.gguf", keys(tokenizer__chat_template=7))
    with pytest.raises(InputError, match="is not a text"):
        ChatTemplate.load(path)


def test_advice_that_is_none_is_refused_by_its_name(tmp_path):
    path = rewrite(GOOD, tmp_path / "x.gguf", keys(general__sampling__top_p=7.0))
    with pytest.raises(InputError, match=r"x\.gguf: top_p = 7\.0"):
        Tokenizer.load(path)


def test_a_file_without_a_tokenizer_is_named_itself(tmp_path):
    path = rewrite(GOOD, tmp_path / "x.gguf", keys(tokenizer__ggml__model="none"))
    tokenizer = tokenizer_of(path, Checkpoint.open(path).config)
    with pytest.raises(
        InputError, match=r"x\.gguf has no tokenizer: give token ids .*, or choose a file that"
    ):
        tokenizer.encode("Once")


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    def change(metadata, entries, data):
        end = len(data) + -len(data) % 32
        added = Entry("blk.1.attn_v.scale", (1,), 0, end)
        return metadata, [*entries, added], data.ljust(end, b"\0") + np.float32(np.nan).tobytes()

    checkpoint = Checkpoint.open(rewrite(GOOD, tmp_path / "x.gguf", change))
    with pytest.raises(InputError, match=r"attn_v\.scale.* is nan"):
        checkpoint.read("backbone.layers.1.mixer.v_proj.weight")


def test_a_tensor_without_a_use_is_refused(tmp_path):
    def change(metadata, entries, data):
        end = len(data) + -len(data) % 32
        return metadata, [*entries, Entry("blk.1.attn_q.bias", (8,), 0, end)], data.ljust(end + 32, b"\0")

    assert "holds 'blk.1.attn_q.bias', which the model of its metadata does not have" in refusal(
        rewrite(GOOD, tmp_path / "x.gguf", change)
    )


def test_a_directory_with_several_files_names_them(tmp_path):
    shutil.copyfile(GOOD, tmp_path / "a.gguf")
    Checkpoint.open(tmp_path)
    shutil.copyfile(GOOD, tmp_path / "mmproj-f16.gguf")
    Checkpoint.open(tmp_path)
    shutil.copyfile(GOOD, tmp_path / "b.gguf")
    assert "several models in GGUF files (a.gguf, b.gguf)" in refusal(tmp_path)


def test_a_blob_without_an_ending_is_read(tmp_path):
    shutil.copyfile(GOOD, tmp_path / "sha256-0123")
    Checkpoint.open(tmp_path / "sha256-0123")


def test_scales_that_do_not_fit_are_refused(tmp_path):
    def change(metadata, entries, data):
        end = len(data) + -len(data) % 32
        return (
            metadata,
            [*entries, Entry("blk.2.ffn_up_exps.scale", (3,), 0, end)],
            data.ljust(end + 32, b"\0"),
        )

    assert "calls for F32 [2]" in refusal(rewrite(GOOD, tmp_path / "x.gguf", change))
