"""Extracts, once, what VESSL's own package says about its run files into vessl_models.json beside this file; checks files by it.

    pip download --no-deps vessl && python tests/vessl_models.py vessl-VERSION-py3-none-any.whl
    python tests/vessl_models.py check docker/vessl.yaml

From the models that `vessl.openapi_client.models` carries it keeps, starting at the form of a run file, every key with its type;
from the command line, the options of `vessl experiment create` and `vessl run create`. The source is read, not imported: the
package's dependencies aren't needed, and tests need neither.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT_MODEL = "V1RunSpecFormBodyInput"
OUTPUT = Path(__file__).with_suffix(".json")
VESSL = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
# A string in place of these forms is VESSL's short way of writing them: `image: NAME`, `/data/: volume://...`, `KEY: value`.
SHORT_FORMS = ("V1ImageForm", "V1ImportForm", "V1MountForm", "V1ExportForm", "V1EnvForm")


def against_models(value: Any, kind: str = ROOT_MODEL, where: str = "run file") -> list[str]:
    """What in a value is not what VESSL's models say: a list of sentences, empty where all is."""
    if kind == "object":
        return []
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [fault for i, item in enumerate(value) for fault in against_models(item, inner[1], f"{where}[{i}]")]
    if inner := re.fullmatch(r"dict\[str, (.+)\]", kind):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        return [fault for key, item in value.items() for fault in against_models(item, inner[1], f"{where}.{key}")]
    if kind in VESSL["models"]:
        if isinstance(value, str) and kind in SHORT_FORMS:
            return []
        if not isinstance(value, dict):
            return [f"{where}: neither a mapping nor a short form"]
        keys = VESSL["models"][kind]
        unknown = [f"{where}.{key}: no such key in {kind}" for key in value if key not in keys]
        return unknown + [
            fault for key in value if key in keys for fault in against_models(value[key], keys[key], f"{where}.{key}")
        ]
    types = {"str": str, "int": int, "bool": bool}
    return [] if type(value) is types[kind] else [f"{where}: not a {kind}"]


def model_of(source: str) -> tuple[str, dict[str, str]]:
    """A model's class name and its keys as they stand in a file, each with its type."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            tables: dict[str, Any] = {}
            for statement in node.body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    tables[statement.targets[0].id] = ast.literal_eval(statement.value)
            types, names = tables["openapi_types"], tables["attribute_map"]
            return node.name, {names[attribute]: types[attribute] for attribute in sorted(types)}
    raise ValueError("no class in this source")


def options_of(sources: dict[str, str], file: str, command: str) -> list[str]:
    """The options of a click command in one of the sources: of its decorators, wherever those are defined by name."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    constants = {
        node.targets[0].id: node.value
        for tree in (*trees.values(), trees[file])
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    function = next(node for node in trees[file].body if isinstance(node, ast.FunctionDef) and node.name == command)
    found = set()
    for decorator in function.decorator_list:
        call = constants.get(decorator.id) if isinstance(decorator, ast.Name) else decorator
        for argument in call.args if isinstance(call, ast.Call) else ():
            if isinstance(argument, ast.Constant) and str(argument.value).startswith("-"):
                found.update(str(argument.value).split("/"))
    return sorted(found)


def check(paths: list[str]) -> int:
    """Says what in run files VESSL does not know; the exit code."""
    import yaml

    faults = [fault for path in paths for fault in against_models(yaml.safe_load(Path(path).read_text()), where=path)]
    print("\n".join(faults) or f"{', '.join(paths)}: every key is one of {VESSL['package']}")
    return 1 if faults else 0


def extract(wheel: str) -> None:
    models: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as package:
        sources = {}
        for name in package.namelist():
            if name.startswith("vessl/openapi_client/models/") and not name.endswith("__init__.py"):
                model, keys = model_of(package.read(name).decode())
                sources[model] = keys
        wanted = [ROOT_MODEL]
        while wanted:
            model = wanted.pop()
            if model in models or model not in sources:
                continue
            models[model] = sources[model]
            wanted += [word for kind in sources[model].values() for word in re.findall(r"\w+", kind)]
        files = [name for name in package.namelist() if re.fullmatch(r"vessl/cli/\w+\.py", name)]
        commands = {name: package.read(name).decode() for name in files}
        options = {
            f"{group} create": options_of(commands, f"vessl/cli/{group}.py", "create") for group in ("experiment", "run")
        }
    content = {"package": Path(wheel).name, "models": dict(sorted(models.items())), "options": options}
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "check":
        sys.exit(check(sys.argv[2:]))
    extract(sys.argv[1])
