"""Recognise what cannot be read: files that are no models, and models that are no image classifiers."""

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

BY_ANSWERS = "test it by its answers instead: --black-box --data DIR --export QUESTIONS"
UNPACK = "unpack it, and give the model's file in it"
HEAD = 512  # bytes of a file that tell what it is
FILES: tuple[tuple[bytes, int, str, str], ...] = (  # bytes in lower case, where they are, kind, way out
    (b"version https://git-lfs", 0, "a pointer of Git LFS, not the file that it stands for", "git lfs pull"),
    (b"<!doctype html", 0, "a web page", "download the file again: what came was a page about it"),
    (b"<html", 0, "a web page", "download the file again: what came was a page about it"),
    (b"\x1f\x8b", 0, "a gzip archive", UNPACK),
    (b"bzh", 0, "a bzip2 archive", UNPACK),
    (b"\xfd7zxz", 0, "an xz archive", UNPACK),
    (b"7z\xbc\xaf", 0, "a 7-Zip archive", UNPACK),
    (b"ustar", 257, "a tar archive", UNPACK),
    (b"\x89hdf", 0, "an HDF5 file, as Keras saves models", BY_ANSWERS),
    (b"tfl3", 4, "a TensorFlow Lite model", BY_ANSWERS),
    (b"gguf", 0, "a language model (GGUF)", "radiotag tests image classifiers alone"),
)


def file_kind(head: bytes) -> tuple[str, str] | None:
    """(kind, way out) of a file that holds no weights that can be read, from its first HEAD bytes; None if unknown.

    >>> file_kind(b"version https://git-lfs.github.com/spec/v1")
    ('a pointer of Git LFS, not the file that it stands for', 'git lfs pull')
    """
    start = head.lower()
    for sign, place, kind, way_out in FILES:
        if start[place:].startswith(sign) or (place == 0 and sign.startswith(b"<") and start.lstrip().startswith(sign)):
            return kind, way_out
    if head[:1] == b"\x08" and head[2:3] in {b"\x12", b"\x1a", b"\x3a"}:  # ONNX: its version, then who wrote it
        return "an ONNX model", BY_ANSWERS
    return None


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
