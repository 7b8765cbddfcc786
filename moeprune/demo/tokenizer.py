"""The demo model's tokenizer: byte-level BPE with 2048 entries, digits one by one."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 2048
BYTES_PER_DOMAIN = 1_000_000

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# GPT-2's word rule without the English contractions; runs of line ends and of indentation stay whole
_WORDS = r" ?\p{L}+| ?\d| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?=\S)|\s+"


def train_tokenizer(corpus):
    """Trains the tokenizer on the same number of bytes of each domain's training text.

    Args:
        corpus: as `moeprune.demo.corpus.build` returns it.

    Returns:
        transformers.PreTrainedTokenizerFast with BOS = EOS = `<|endoftext|>`, a pad token and a plain chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _sample(corpus):
    for splits in corpus.values():
        total = 0
        for text in splits["train"]:
            if total > BYTES_PER_DOMAIN:
                break
            total += len(text.encode())
            yield text
