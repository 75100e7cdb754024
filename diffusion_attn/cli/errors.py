"""How an error is told on the command line: in one sentence."""

from __future__ import annotations

import argparse
import re

from diffusion_attn.core.errors import DiffusionAttnError, is_out_of_memory


class CommandError(DiffusionAttnError):
    """What the command line asks for cannot be done; the message names the argument, its value and the remedy."""


def sentence(error: BaseException) -> str:
    """What a user is told of ``error``, on one line."""
    if is_out_of_memory(error):
        return (
            "memory ran out; ask for a smaller --size or --batch, halve the weights with --dtype float16, or enable a "
            "method that needs less, such as --method hidiffusion; to distil, lower --optim.micro_batch or add "
            "--run.gradient_checkpointing true."
        )
    if isinstance(error, argparse.ArgumentError):
        return _of_argument(str(error))
    # What strangers call their files and tensors is no command for the terminal.
    message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    if isinstance(error, (DiffusionAttnError, ValueError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message or 'no message'}; add --debug to see where it comes from."


def _of_argument(message: str) -> str:
    """jsonargparse's several lines about a value of the wrong type as one; other messages with a pointer to help."""
    key = re.match(r'Parser key "(.+?)":', message)
    value = re.search(r"value: (.*)\Z", message, re.DOTALL)
    choices = re.search(r"Expected a typing\.Literal\[(.*?)\]", message)
    if not key or not value:
        return f"{' '.join(message.split())}; see --help."
    kinds = dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
    expected = " or ".join("null" if kind == "NoneType" else kind for kind in kinds) or "another value"
    if choices:
        expected = f"one of {choices[1]}".replace("'", "")
    # Sections of a recipe are flat names inside.
    return f"--{key[1].replace('__', '.')} {value[1]!r}: expected {expected}; see --help."
