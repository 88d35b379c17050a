"""Any causal language model's head, read where the model itself reads it, and proved against the model's own logits.

>>> loss, output = with_head(model, lambda hidden, head: loss_of(hidden, head), input_ids=ids, attention_mask=mask)
>>> loss.backward()

:func:`with_head` runs the model's own forward up to its head and a function there; :func:`read_hidden` is its short
form; :func:`head_of` says what the head is. All three take a model as it is: a transformers model or one of your own,
with PEFT adapters or without, compiled, spread over devices, wrapped by DDP, sharded by FSDP2 or DeepSpeed.
"""

from .errors import ModelError
from .heads import read_hidden, with_head
from .proof import head_of

__all__ = ["ModelError", "head_of", "read_hidden", "with_head"]
