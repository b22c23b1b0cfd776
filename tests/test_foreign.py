"""A model that is no image classifier is told so in one line, and no classifier is taken for something else."""

import gzip
import zipfile

import pytest
import torch
import torchvision
from helpers import bad, good

from radiotag.errors import RadiotagError
from radiotag.foreign import KINDS, kind_of
from radiotag.networks import architectures, load_network

LRASPP = "lraspp_mobilenet_v3_large"
KNOWN = {
    "a LoRA adapter": ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"],
    "a diffusion model": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
    "a language model": ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"],
    "a model of images and text": ["logit_scale", "visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"],
    "a detector": ["model.22.dfl.conv.weight", "model.0.conv.weight"],
    "a segmentation network": ["decode_head.conv_seg.weight", "backbone.conv1.weight"],
    "an image autoencoder": ["encoder.conv_in.weight", "quant_conv.weight", "decoder.conv_in.weight"],
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_model_of_another_kind_is_told_so_in_one_line(kind, tmp_path):
    torch.save({name: torch.zeros(4, 4) for name in KNOWN[kind]}, tmp_path / "m.pt")
    good("keygen", "-o", tmp_path / "k.safetensors", "--classes", 3)
    result = bad("verify", tmp_path / "m.pt", "--key", tmp_path / "k.safetensors")
    error, hint = result.err.splitlines()[-2:]
    assert f"m.pt: it looks like {kind}" in error and error.endswith("not an image classifier")
    assert "image classifiers alone" in hint


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large", LRASPP])
def test_torchvisions_detectors_and_segmentation_networks_are_known(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    kind = kind_of(model.state_dict())
    assert kind == ("a segmentation network" if "lraspp" in name else "a detector")


def test_no_classifier_of_torchvision_is_taken_for_another_kind():
    from radiotag.networks import _stock_shapes

    for name in architectures():
        assert kind_of(_stock_shapes(name, False, 224)) is None, name


def test_each_kind_has_signs():
    assert all(signs and all(signs) for _, signs in KINDS)


OTHERS = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE HTML><html></html>", "a gzip archive": gzip.compress(b"x"),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(600), "a tar archive": bytes(257) + b"ustar" + bytes(600),
    "an ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "a language model": b"GGUF\x03" + bytes(99),
    "a 7-Zip archive": b"7z\xbc\xaf\x27\x1c", "a TensorFlow Lite model": b"\x1c\0\0\0TFL3" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["m.pt", "m.onnx", "m.safetensors"])
def test_a_file_of_another_kind_is_named_for_what_it_is(kind, name, tmp_path):
    (tmp_path / name).write_bytes(OTHERS[kind])
    with pytest.raises(RadiotagError, match=rf"{name} is {kind}") as error:
        load_network(tmp_path / name)
    assert error.value.hint


def test_archives_and_folders_that_hold_a_model_somewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as file:
        file.writestr("weights/model.pt", b"x")
    with pytest.raises(RadiotagError, match=r"m\.zip is a zip archive without a PyTorch model"):
        load_network(tmp_path / "m.zip")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RadiotagError, match="hub is a folder") as error:
        load_network(tmp_path / "hub")
    assert str(tmp_path / "hub" / "model.safetensors") in error.value.hint
