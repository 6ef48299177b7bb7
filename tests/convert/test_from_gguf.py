"""A GGUF file as people hand small models around becomes a Hugging Face folder that is the same model."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moba_megatron.config import ConfigError
from moba_megatron.convert.from_gguf import from_gguf

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEMPLATE = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"


def tiny_model():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(
        **SHAPE, **heads, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def as_llama_cpp_keeps_it(weight, heads):
    """The rows of query and key weights, rotary pairs adjacent."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32):
    """The model as llama.cpp's converters write a Llama: its names of tensors and keys. Norms stay in fp32."""
    config = model.config
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9, "a block of keys " * 9], trainer)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Somebody's tiny model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    kinds = [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word, _ in words]
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    of_layer = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in of_layer.items()}
    for name, weight in model.state_dict().items():
        if name not in names:
            continue  # the tied output layer
        weight = weight.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = as_llama_cpp_keeps_it(weight, heads)
        if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(names[name], np.ascontiguousarray(weight))
        else:
            writer.add_tensor(names[name], gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


def test_the_folder_is_the_same_model(tmp_path):
    model = tiny_model()
    tokenizer = write_gguf(tmp_path / "tiny.gguf", model)
    from_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32 and again.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # Numbers that went through fp32 are those that were meant; nobody's name for the model is left.
    assert (again.config.rms_norm_eps, again.config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert "Somebody" not in (tmp_path / "out/config.json").read_text()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick block of keys<|im_end|>"
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids
    assert read.chat_template == TEMPLATE and read.eos_token == "<|im_end|>"


def test_quantized_weights_become_the_numbers_they_stand_for(tmp_path):
    model = tiny_model()
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    from_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    want = gguf.quants.dequantize(gguf.quants.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(again[name], torch.from_numpy(want)) and not torch.equal(again[name], model.state_dict()[name])


def test_mistakes_are_named_and_nothing_is_left(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04 an archive")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    for source, out, says in (
        ("missing.gguf", "out", "is not a file"),
        ("no.gguf", "out", "does not begin with GGUF"),
        ("cut.gguf", "out", "cut.gguf"),
        ("no.gguf", "there", "nothing is overwritten"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_gguf(tmp_path / source, tmp_path / out)
        assert not (tmp_path / "out").exists()
    command = [
        sys.executable,
        "-m",
        "moba_megatron.convert.from_gguf",
        str(tmp_path / "no.gguf"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
