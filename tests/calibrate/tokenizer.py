"""A tokenizer without training or files: one token a byte."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

EOS, PAD, FIRST_BYTE = 1, 2, 3
NUM_IDS = 256 + FIRST_BYTE
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    vocab = {"<bos>": 0, "<eos>": EOS, "<pad>": PAD} | {f"<0x{byte:02X}>": byte + FIRST_BYTE for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": tokenizer, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | options
    )


def ids_of(text: str) -> list[int]:
    return [byte + FIRST_BYTE for byte in text.encode()]
