import pytest
from accelerate.state import AcceleratorState, GradientState

from diffusion_attn.distill import DistillConfig, Distiller
from tests import tiny


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Runs in one process differ in precision, which accelerate holds to be a property of the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A folder with a tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(teacher, tmp_path):
    """The sections of a small run on the tiny teacher: six steps of two pictures."""
    return {
        "model": {"name": teacher},
        "data": {"source": "shapes", "size": 32, "caption_dropout": 0.2},
        "optim": {"lr": 1e-3, "batch_size": 2, "micro_batch": 1, "max_grad_norm": 1.0, "ema_decay": 0.9},
        "run": {"output": str(tmp_path / "run"), "steps": 6, "save_every": 2, "log_every": 1},
    }


@pytest.fixture
def distil(recipe, tmp_path):
    """Run the recipe with changes by section; returns the distiller."""
    (tmp_path / "empty.yaml").write_text("{}")

    def run(**changes):
        settings = {name: {**recipe.get(name, {}), **changes.get(name, {})} for name in {**recipe, **changes}}
        distiller = Distiller(DistillConfig.load(tmp_path / "empty.yaml", settings), quiet=True)
        distiller.student = distiller.train()
        return distiller

    return run
