"""The rules of the house, read from the source: who may import whom, and which door each third party stands behind."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for d in ("fvdm", "data_prep", "launchers", "benchmarks") for p in (ROOT / d).glob("*.py"))
MATHEMATICS = {
    "timesteps",
    "diffusion",
    "samplers",
    "model",
    "attention",
    "ema",
    "tasks",
    "solvers",
    "guidance",
    "matrices",
    "protocols",
    "distances",
    "recipe",
}
LAYERS = (
    {"files"},
    {"timesteps", "attention", "distributed", "config", "ema", "vae", "media", "location", "videos", "i3d"}
    | {"pretrained", "provenance", "protocols", "mlflow_model"},
    {"diffusion", "shards", "matrices"},
    {"model", "solvers", "guidance", "data", "engine", "checkpoint", "fvd", "continuity"},
    {"convert", "compilation", "samplers", "tracking", "writer", "distances"},
    {"tasks", "recipe"},
    {"inputs"},
    {"previews", "pipeline"},
    {"run", "registry"},
    {"pyfunc", "train", "generate", "plan"},
)
DOORS = {
    "deepspeed": {"fvdm/engine.py"},
    "mlflow": {"fvdm/tracking.py", "fvdm/mlflow_model.py", "fvdm/pyfunc.py"},
    "flash_attn": {"fvdm/attention.py"},
    "diffusers": {"fvdm/vae.py", "data_prep/train_vae.py", "benchmarks/train_speed.py", "benchmarks/encode_speed.py"},
    "webdataset": {"fvdm/location.py", "data_prep/samples.py"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_third_parties_stand_behind_their_doors(path):
    name = str(path.relative_to(ROOT))
    for package, doors in DOORS.items():
        used = any(module.split(".")[0] == package for module in imports(path))
        assert not used or name in doors, f"{name} imports {package}; only {', '.join(sorted(doors))} may"
    used = any(module.split(".")[0] == "submitit" for module in imports(path))
    assert not used or not name.startswith("fvdm/"), f"{name} imports submitit; only jobs may"


@pytest.mark.parametrize("path", sorted((ROOT / "fvdm").glob("*.py")), ids=lambda p: p.stem)
def test_arrows_point_down(path):
    modules = imports(path)
    assert not {m.split(".")[0] for m in modules} & {"data_prep", "launchers", "benchmarks", "tests"}
    if path.stem == "__init__":
        return
    below = {m.split(".")[1] for m in modules if m.startswith("fvdm.")} & set.union(*LAYERS)
    for other in below:
        assert level(other) < level(path.stem), f"{path.stem} imports {other}, which is not below it"


@pytest.mark.parametrize("name", sorted(MATHEMATICS))
def test_the_mathematics_knows_no_files_no_ranks_and_draws_from_generators(name):
    source = (ROOT / "fvdm" / f"{name}.py").read_text()
    assert not imports(ROOT / "fvdm" / f"{name}.py") & {"os", "pathlib", "torch.distributed", "fvdm.distributed"}
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not {c.func.id for c in calls} & {"print", "open"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_place_knows_how_a_file_is_made_whole(path):
    if path.name != "files.py":
        assert not {"os.fsync", "os.replace"} & {
            ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path} is too long to read in one go"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name} is too long"
