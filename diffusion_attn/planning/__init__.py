"""What a run would cost on a given model at a given size: FLOPs and memory, without weights and without running it."""

from diffusion_attn.planning.forecast import Forecast, forecast, forecast_decode, on_meta
from diffusion_attn.planning.layouts import Layout, load_layout

__all__ = ["Forecast", "Layout", "forecast", "forecast_decode", "load_layout", "on_meta"]
