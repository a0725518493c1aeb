"""Extracts, once, what VESSL's own package says about its run files, into vessl_models.json beside this file.

    pip download --no-deps vessl && python tests/vessl_models.py vessl-VERSION-py3-none-any.whl

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


def main(wheel: str) -> None:
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
    main(sys.argv[1])
