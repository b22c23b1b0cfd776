"""A model that is no image classifier is told so in one line, and no classifier is taken for something else."""

import pytest
import torch
import torchvision
from helpers import bad, good

from radiotag.foreign import KINDS, kind_of
from radiotag.networks import architectures

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
