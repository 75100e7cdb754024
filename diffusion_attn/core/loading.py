"""How models are loaded: the place, and what the loaders of diffusers and transformers are told."""

from __future__ import annotations

from pathlib import Path

from diffusion_attn.core.errors import UnsupportedModelError

NO_CODE = {"trust_remote_code": False}
"""For tokenizers, processors and configurations: nothing that lies in their folder is run, and nobody is asked to."""

WEIGHTS_ONLY = {**NO_CODE, "use_safetensors": True}
"""For models and pipelines: the same, and weights that are pickles are refused."""

MODEL_ONLY = {**WEIGHTS_ONLY, "adapter_kwargs": {"subfolder": "-"}}
"""For models of transformers: and no adapter is looked for beside them, whose weights may be a pickle all the same."""

_ADAPTER = "adapter_config.json"


def find_model(name: str) -> str | Path:
    """The folder ``name``, or else the name itself, which may be a Hub id.

    Raises:
        UnsupportedModelError: an adapter lies beside a model in the folder. Where peft is installed transformers loads
            it unasked, whatever the loader is told of pickles and code.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    if (adapter := next(folder.rglob(_ADAPTER), None)) is not None:
        raise UnsupportedModelError(
            f"an adapter lies beside the model in {name!r}, {adapter.relative_to(folder).as_posix()}; take it away."
        )
    return folder
