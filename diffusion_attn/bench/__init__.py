"""Time, memory, operations and quality of methods on a pipeline, beside the plain model's."""

from diffusion_attn.bench.applicable import applicable_methods
from diffusion_attn.bench.parity import ParityError
from diffusion_attn.bench.plot import plot
from diffusion_attn.bench.run import OtherSettingsError, run_bench

__all__ = ["OtherSettingsError", "ParityError", "applicable_methods", "plot", "run_bench"]
