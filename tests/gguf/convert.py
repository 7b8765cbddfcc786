"""Run llama.cpp's convert_hf_to_gguf.py on a tiny model: ``convert.py LLAMA_CPP MODEL OUT TYPE``.

The tiny models' tokenizers are not in the converter's list, and some have none: the former count as GPT-2's, the latter
are left out. Nothing else is changed.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

llama_cpp, model, out, kind = sys.argv[1:]
sys.path[:0] = [llama_cpp, str(Path(llama_cpp, "gguf-py"))]

from conversion.base import TextModel  # noqa: E402  # type: ignore[import-not-found]

TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
if not Path(model, "tokenizer_config.json").is_file():
    prepare = TextModel.prepare_metadata

    def without_vocabulary(self: TextModel, *args: object, **options: object) -> None:
        type(self).set_vocab = lambda _: None
        prepare(self, *args, **options)

    TextModel.prepare_metadata = without_vocabulary
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind]
runpy.run_path(str(Path(llama_cpp, "convert_hf_to_gguf.py")), run_name="__main__")
