"""Who may import whom, and what `import keras_effnet` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "keras_effnet"

# Room by room, which rooms it may import directly; what those may import, it may import as well.
ROOMS: dict[str, set[str]] = {
    "version": set(),
    "specs": set(),
    "scaling": {"specs"},
    "blocks": {"scaling"},
    "preprocessing": {"specs"},
    "weights": {"scaling"},
    "builder": {"blocks", "preprocessing"},
    "conversion": {"builder", "weights"},
    "models": {"conversion"},
    "data": {"preprocessing"},
    "plotting": {"scaling"},
    "quantization": set(),
    "training": {"models", "data", "plotting", "quantization"},
    "export": {"quantization"},
    # The public names.
    "": {"models", "data", "export", "plotting", "training", "version"},
    "cli": {""},
}
# Rooms that import the standard library and other such rooms alone.
STANDARD_LIBRARY_ONLY = {"specs", "scaling", "version"}

# Loading any of these would make a first model slow to get, or need what an extra installs.
NOT_LOADED = (
    "PIL",
    "ai_edge_litert",
    "keras_effnet.export",
    "keras_effnet.quantization",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "safetensors",
    "sklearn",
    "tensorflow.lite",
    "tensorflow_model_optimization",
    "tf2onnx",
    "tf_keras",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, `export/` under its installed name."""
    folders = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.export": ROOT / "export"}
    found = {}
    for prefix, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            # The stub of a package names what it loads when it is used.
            stub = path.with_suffix(".pyi")
            name = ".".join([prefix, *(part for part in parts if part != "__init__")])
            found[name] = stub if stub.exists() else path
    return found


def room_of(module: str) -> str:
    """`keras_effnet.export.verify` -> `export`; the package itself is the room ``."""
    return module.split(".")[1] if "." in module else ""


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Absolute names of the modules that a source imports anywhere, functions included.

    `from a import b` imports `a.b` where that is a module, else `a`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                levels = node.level - 1 if is_package else node.level
                parents = module.split(".")
                base = ".".join([*parents[: len(parents) - levels], *filter(None, [base])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in known else base)
    return found


def allowed_rooms(room: str) -> set[str]:
    allowed = {room}
    for other in ROOMS[room]:
        allowed |= allowed_rooms(other)
    return allowed


def violations(source: str, module: str, is_package: bool, known: set[str]) -> list[str]:
    """What a source imports against the table."""
    room = room_of(module)
    allowed = allowed_rooms(room)
    wrong = []
    for name in sorted(imports(source, module, is_package, known)):
        if name.split(".")[0] == PACKAGE:
            if room_of(name) not in allowed:
                wrong.append(name)
        elif room in STANDARD_LIBRARY_ONLY and name.split(".")[0] not in sys.stdlib_module_names:
            wrong.append(name)
    return wrong


MODULES = modules()


def test_the_table_names_every_room():
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_import_table_is_kept(module):
    path = MODULES[module]
    is_package = path.stem == "__init__"
    assert violations(path.read_text(encoding="utf-8"), module, is_package, set(MODULES)) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("specs", "import numpy", ["numpy"]),
        ("specs", "from . import scaling", ["keras_effnet.scaling"]),
        ("scaling", "from .specs import ModelSpec\nimport math", []),
        ("scaling", "def f():\n    from keras_effnet import blocks", ["keras_effnet.blocks"]),
        ("blocks", "from .specs import ModelSpec", []),
        ("builder", "import keras_effnet.models as m", ["keras_effnet.models"]),
        ("models", "from keras_effnet.export import to_tflite", ["keras_effnet.export.to_tflite"]),
        ("models", "from keras_effnet import get_spec", ["keras_effnet"]),
        ("quantization.fake_quant", "from ..specs import ModelSpec", ["keras_effnet.specs"]),
        ("quantization.fake_quant", "from .params import QuantParams\nimport keras", []),
        ("export.verify", "from ..quantization import params", []),
        ("export.verify", "from .. import models", ["keras_effnet.models"]),
        ("export.verify", "import keras_effnet.cli", ["keras_effnet.cli"]),
        ("cli.family", "from ..export.files import write_whole\nimport keras_effnet", []),
    ],
)
def test_the_check_sees_violations(module, source, wrong):
    assert violations(source, f"{PACKAGE}.{module}", False, set(MODULES)) == wrong


def test_relative_imports_of_a_package_count_from_itself():
    source = "from .params import QuantParams\nfrom ..models import build"
    wrong = violations(source, f"{PACKAGE}.quantization", True, set(MODULES))
    assert wrong == ["keras_effnet.models"]


def loaded_by(code):
    """Modules that a fresh process has loaded after some code."""
    code = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_import_and_help_load_no_keras():
    for code in (
        "import keras_effnet.export",
        "from keras_effnet import cli, resolve; cli.make_parser()",
    ):
        loaded = loaded_by(code)
        assert "keras_effnet" in loaded
        assert not {"keras", "tensorflow", "jax", "torch"} & set(loaded), code


def test_a_model_needs_no_optional_dependency():
    """What Keras itself loads is not ours to change."""
    before = loaded_by("import keras")
    loaded = set(loaded_by("from keras_effnet import EfficientNetB0")) - set(before)
    assert "keras_effnet.models" in loaded
    heavy = [name for name in loaded if any(f"{name}.".startswith(f"{n}.") for n in NOT_LOADED)]
    assert heavy == []


def test_every_public_name_can_be_used():
    import keras_effnet

    assert {"EfficientNetB0", "create_model", "quantization"} <= set(keras_effnet.__all__)
    assert set(keras_effnet.__all__) <= set(dir(keras_effnet))
    for name in keras_effnet.__all__:
        assert getattr(keras_effnet, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = keras_effnet.no_such_name
