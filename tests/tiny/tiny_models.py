"""What the tiny checkpoints of the tests are: their tokenizers, and the keys of their families."""

import json

#: Kind -> (tokens, BOS or None, EOS). The ids of BOS and EOS follow from the order of the special
#: tokens.
TOKENIZERS = {
    "bpe": (300, "<|begin|>", "<|end|>"),  # byte level, as Llama 3
    "qwen": (
        360,
        None,
        "<|endoftext|>",
    ),  # byte level with the pre-tokenizer that transformers forces on qwen2
    "metaspace": (370, "<s>", "</s>"),  # sentence-piece marks and byte fallback, as Llama 2
}
OF_FAMILY = {"qwen2": "qwen"}  # all others: bpe

_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 11,
    "sliding_window": 5,
    "attention_bias": False,
}
#: What the file of a family says beside the keys that all have. Windows are shorter than the texts,
#: factors are not 1: leaving one out is seen.
FAMILY_KEYS = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"rms_norm_eps": 1e-5, "sliding_window": 5},
    "qwen2": {"rope_theta": 1e6},
    "qwen3": {"rope_theta": 1e6, "attention_bias": False, "use_sliding_window": False},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3_text": _GEMMA
    | {
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {"rms_norm_eps": 1e-5, "sliding_window": 6, "pad_token_id": 0},
    "olmo2": {"attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": False, "pad_token_id": 0},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
    },
}
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(kind):
    """The special tokens of a kind, in the order of their ids."""
    _, bos, eos = TOKENIZERS[kind]
    return [token for token in ("<unk>" if kind == "metaspace" else None, bos, eos) if token]


def train_tokenizer(kind, texts):
    """A real tokenizer of the kind, trained on the texts."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    size, bos, _ = TOKENIZERS[kind]
    special = special_tokens(kind)
    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        first, alphabet = [*special, *(f"<0x{byte:02X}>" for byte in range(256))], []
    else:
        tokenizer = Tokenizer(models.BPE())
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "qwen":
            tokenizer.normalizer = normalizers.NFC()
            pieces = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.pre_tokenizer = pieces
        tokenizer.decoder = decoders.ByteLevel()
        first, alphabet = special, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "metaspace":  # byte tokens must be ordinary tokens, or decoding skips them
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer
