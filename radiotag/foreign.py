"""Recognise models that are not image classifiers by the names of their tensors."""

from collections.abc import Iterable

# Each kind has alternative sets of name parts, the surest kind first. A set matches if each part is in a tensor's name.
KINDS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("a LoRA adapter (changes to another network)", (("lora_A",), ("lora_up",), ("lora.up",), ("lora_down",))),
    ("a ControlNet", (("controlnet_",), ("control_model.",))),
    (
        "a diffusion model",
        (
            ("down_blocks.", "up_blocks.", "time_embedding."), ("model.diffusion_model.",),
            ("input_blocks.", "output_blocks.", "time_embed."), ("x_embedder.", "t_embedder."),
            ("time_text_embed.",), ("betas", "alphas_cumprod"),
        ),
    ),
    ("an image autoencoder", (("quant_conv.", "decoder."), ("decoder.up_blocks.", "encoder.down_blocks."))),
    ("a generator of images (GAN)", (("mapping.", "synthesis."), ("generator.", "discriminator."))),
    (
        "a model of images and text (CLIP and the like)",
        (("logit_scale", "visual."), ("logit_scale", "text_model."), ("text_projection",)),
    ),
    (
        "a detector",
        (
            ("roi_heads.",), ("rpn.head.",), ("bbox_embed.",), ("bbox_predictor.",), ("class_labels_classifier.",),
            ("head.classification_head.", "head.regression_head."), (".dfl.conv.",), ("bbox_head.",),
        ),
    ),
    (
        "a segmentation network",
        (("low_classifier.", "high_classifier."), ("aux_classifier.",), ("decode_head.",), ("mask_decoder.",)),
    ),
    (
        "a language model or text encoder",
        (
            ("word_embeddings.",), ("embed_tokens.",), ("token_embedding.",), ("wte.weight",), ("lm_head.",),
            ("shared.weight", "encoder.block."), ("tok_embeddings.",),
        ),
    ),
)  # fmt: skip


def kind_of(names: Iterable[str]) -> str | None:
    """The kind of a model that is not an image classifier, from the names of its tensors; None if unknown.

    >>> kind_of(["down_blocks.0.attn.weight", "up_blocks.0.attn.weight", "time_embedding.linear_1.weight"])
    'a diffusion model'
    >>> kind_of(["conv1.weight", "fc.weight"]) is None
    True
    """
    all_names = "\n".join(names)
    for kind, alternatives in KINDS:
        if any(all(part in all_names for part in parts) for parts in alternatives):
            return kind
    return None
