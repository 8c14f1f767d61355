"""Writes the bundled model as a GGUF file that llama.cpp reads, quantised to q8_0."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import sentencepiece as spm
import torch
from model import Llama, Shape
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Takes llama.cpp's messages and drops them."""


def _tensor_name(name: str) -> str:
    return name.replace("blocks.", "blk.")


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("h2o stories")
    writer.add_description("Simple stories, facts and questions; trained on generated text")
    writer.add_license("cc0-1.0")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _piece_type(processor: spm.SentencePieceProcessor, index: int) -> gguf.TokenType:
    if processor.is_unknown(index):
        return gguf.TokenType.UNKNOWN
    if processor.is_control(index):
        return gguf.TokenType.CONTROL
    if processor.is_byte(index):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: bytes) -> None:
    processor = spm.SentencePieceProcessor(model_proto=tokenizer)
    indices = range(processor.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(index).encode() for index in indices])
    writer.add_token_scores([processor.get_score(index) for index in indices])
    writer.add_token_types([_piece_type(processor, index) for index in indices])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_f32(weights: dict[str, Tensor], shape: Shape, tokenizer: bytes, path: Path) -> None:
    """Writes the weights, unquantised, with the metadata of the `llama` architecture."""
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_shape(writer, shape)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in weights.items():
        writer.add_tensor(_tensor_name(name), tensor.detach().float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path) -> None:
    """Makes the q8_0 file of an f32 file with llama.cpp."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    options.nthread = 1
    llama_cpp.llama_log_set(_silent, None)
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def export(weights: dict[str, Tensor], shape: Shape, tokenizer: bytes, output: Path) -> None:
    """Writes `output` as a q8_0 file; the old file stays until the new one is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    whole = output.with_suffix(".f32.tmp")
    small = output.with_suffix(".q8_0.tmp")
    try:
        write_f32(weights, shape, tokenizer, whole)
        quantise(whole, small)
        os.replace(small, output)
    finally:
        whole.unlink(missing_ok=True)
        small.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[Llama, bytes]:
    """The network and the tokenizer of a checkpoint that train.py wrote."""
    state = torch.load(path, weights_only=True)
    model = Llama(Shape())
    model.load_state_dict(state["model"])
    return model.eval(), state["tokenizer"]
