"""What the loaders of diffusers and transformers are told wherever a model is loaded."""

NO_CODE = {"trust_remote_code": False}
"""For tokenizers, processors and configurations: nothing that lies in their folder is run, and nobody is asked to."""

WEIGHTS_ONLY = {**NO_CODE, "use_safetensors": True}
"""For models and pipelines: the same, and weights that are pickles are refused."""
