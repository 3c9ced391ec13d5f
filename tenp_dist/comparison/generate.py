"""One checkpoint in transformers: what it writes after a prompt, and its probabilities along an answer.

Shape legend: P tokens of a prompt, T tokens of an answer, V rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tenp_dist  # noqa: F401 teaches transformers the ragged layout
from tenp_dist.checkpoint.families.table import auto_class
from tenp_dist.errors import DeviceError, NumericalError, SourceError, one_line


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that is loaded as a whole.

    folder: of the checkpoint.
    model: a causal language model of transformers.
    tokenizer: its own.
    """

    folder: Path
    model: Any
    tokenizer: Any

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def prompt_ids(self, prompt: str, *, chat: bool) -> list[int]:
        """Tokens of a prompt; chat: as a user's message, in the model's chat template."""
        if not chat:
            return list(self.tokenizer(prompt)["input_ids"])
        if not self.tokenizer.chat_template:
            raise SourceError("The tokenizer has no chat template", where=self.folder, next_step="leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    @torch.no_grad()
    def answer(self, prompt_P: list[int], length: int) -> list[int]:
        """The most likely continuation, token by token, at most `length` of them; its end mark belongs to it."""
        input_1P = torch.tensor([prompt_P], device=self.model.device)
        made = self.model.generate(
            input_1P,
            attention_mask=torch.ones_like(input_1P),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        return made[0, len(prompt_P) :].tolist()

    @torch.no_grad()
    def logits(self, prompt_P: list[int], answer_T: list[int]) -> torch.Tensor:
        """What the model expects in the place of every token of an answer, [T, V] float32 in host memory.

        Raises:
            NumericalError: NaN or Inf among them.
        """
        input_1N = torch.tensor([[*prompt_P, *answer_T[:-1]]], device=self.model.device)
        logits_TV = self.model(input_1N, logits_to_keep=len(answer_T)).logits[0].float().cpu()
        if not logits_TV.isfinite().all():
            raise NumericalError("NaN or Inf in logits", where=self.folder, next_step="try --dtype float32")
        return logits_TV

    def texts(self, ids: list[int]) -> list[str]:
        """The text that every token adds; a character of several tokens appears with its last one."""
        texts, shown = [], ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end])
            whole = text.removesuffix("\N{REPLACEMENT CHARACTER}") if end < len(ids) else text
            texts.append(whole[len(shown) :])
            shown = whole
        return texts


def load(folder: Path, device: str, dtype: str) -> Loaded:
    """Load a checkpoint onto a device; on accelerators it may spread over all of them.

    Args:
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or auto: float32 on CPU, the checkpoint's own on accelerators.

    Raises:
        DeviceError: no accelerator where one was asked for.
        SourceError: transformers does not load it.
    """
    import transformers

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("No accelerator was found", wanted="cuda", next_step="leave out --device, or choose cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = ("auto" if on_gpu else "float32") if dtype == "auto" else dtype
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind = auto_class(transformers.AutoConfig.from_pretrained(folder).model_type)
        model = getattr(transformers, kind).from_pretrained(folder, dtype=chosen, device_map="auto" if on_gpu else None)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SourceError(
            "The checkpoint does not load in transformers",
            where=folder,
            found=one_line(error),
            wanted="a folder with config.json, weights and tokenizer",
            next_step="correct the path",
        ) from error
    return Loaded(folder, model.eval(), tokenizer)
