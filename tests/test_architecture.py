"""The rules of the house, read from the source: layers, third parties, and small files and functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("fvdm", "data_prep", "launchers", "benchmarks")
SOURCES = sorted(path for folder in TOP for path in (ROOT / folder).rglob("*.py"))

# From the bottom up. A module may import what is in its own layer or in one below it, never from above; modules of one
# layer must not import each other in a circle. A package stands for all its modules.
LAYERS = (
    (
        "fvdm.background",
        "fvdm.choices",
        "fvdm.files",
        "fvdm.help",
        "fvdm.hub",
        "fvdm.interrupts",
        "fvdm.config",
        "fvdm.distributed",
    ),
    ("fvdm.diffusion", "fvdm.media", "fvdm.tracking"),
    ("fvdm.models", "fvdm.data", "fvdm.checkpoints"),
    ("fvdm.generation",),
    ("fvdm.evaluation", "fvdm.serving", "fvdm.playground"),
    ("fvdm.training",),
    ("fvdm.cli",),
    ("data_prep",),
    ("launchers",),
    ("benchmarks",),
)
# What only collects names, and the former names of commands.
OUTSIDE = {
    f"fvdm.{name}"
    for name in ("__main__", "generate", "convert", "checkpoint", "pipeline", "plan", "registry", "train")
} | {"fvdm"}
DOORS = {
    "deepspeed": {"fvdm/training/engine.py"},
    "mlflow": {f"fvdm/tracking/{name}.py" for name in ("server", "delivery", "logged_model", "system_metrics")}
    | {"fvdm/serving/pyfunc.py"},
    "flash_attn": {"fvdm/models/attention.py"},
    "filelock": {"fvdm/files.py"},
    "diffusers": {
        "fvdm/media/vae.py",
        "fvdm/media/fast_layers.py",
        "data_prep/train_vae.py",
        "data_prep/vae_training.py",
        "benchmarks/peers.py",
        "benchmarks/encode_speed.py",
    },
    "transformers": {"fvdm/media/text.py"},
    "webdataset": {"fvdm/data/location.py", "data_prep/samples.py"},
    "fsspec": {"fvdm/data/location.py"},
    "peft": {"fvdm/models/lora.py"},
    "gradio": {"fvdm/playground/app.py"},
    "pyarrow": {f"fvdm/data/{name}.py" for name in ("index", "opening", "former")},
    "submitit": {f"launchers/{name}.py" for name in ("job", "local", "submission")} | {"data_prep/slurm_jobs.py"},
}
# Pure functions of tensors: no files, no ranks, no printing; randomness comes in as a generator.
MATHEMATICS = sorted((ROOT / "fvdm" / "diffusion").glob("*.py")) + [
    ROOT / "fvdm" / "models" / name for name in ("latte.py", "attention.py")
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of the project that a file imports; a package only where nothing in it is named."""
    named = imports(path) & set(MODULES)
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)} - {module_of(path)}


def layer(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) for name in names if module == name or module.startswith(f"{name}.")]
    assert found, f"{module} is in no layer; add it to LAYERS"
    return found[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_is_in_a_layer_and_imports_nothing_above_it(module):
    if module in OUTSIDE:
        return
    own = layer(module)
    for other in own_imports(MODULES[module]) - OUTSIDE:
        assert layer(other) <= own, f"{module} imports {other}, which is above it"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_packages_of_one_layer_import_each_other_one_way():
    for names in LAYERS:
        for a in names:
            for b in names:
                if a < b:
                    ways = [
                        any(
                            other.startswith(f"{y}.")
                            for module, path in MODULES.items()
                            if module.startswith(f"{x}.")
                            for other in own_imports(path)
                        )
                        for x, y in ((a, b), (b, a))
                    ]
                    assert not all(ways), f"{a} and {b} import each other"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_third_parties_are_imported_in_one_place(path):
    name = str(path.relative_to(ROOT))
    for package, doors in DOORS.items():
        used = any(module.split(".")[0] == package for module in imports(path))
        assert not used or name in doors, f"{name} imports {package}; only {', '.join(sorted(doors))} may"


def test_the_list_of_places_is_up_to_date():
    for package, doors in DOORS.items():
        for door in doors:
            assert package in {module.split(".")[0] for module in imports(ROOT / door)}, f"{door} has no {package}"


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda p: str(p.relative_to(ROOT)))
def test_mathematics_reads_no_files_knows_no_ranks_and_prints_nothing(path):
    assert not imports(path) & {"os", "pathlib", "torch.distributed", "fvdm.distributed", "fvdm.files"}
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {c.func.id for c in calls if isinstance(c.func, ast.Name)} & {"print", "open"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_atomic_writes_have_one_implementation(path):
    if path.name != "files.py":
        assert not {"os.fsync", "os.replace"} & {
            ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350, f"{path} is too long to read in one go"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_backbones_are_named_in_their_package_alone(path):
    if "fvdm/models/" in str(path):
        return
    named = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not named & {"Latte", "LatteConfig", "Wan", "WanConfig"}
    assert not imports(path) & {"fvdm.models.latte", "fvdm.models.wan"}
