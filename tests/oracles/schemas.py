"""The published schemas, as validators: tolerant, and strict about fields that none describes."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    return {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES}


@cache
def validator(name: str, *, strict: bool = True) -> Draft202012Validator:
    """A schema's validator; strict: a property that no schema describes is an error."""
    schemas = copy.deepcopy(_schemas())
    if strict:
        for schema in schemas.values():
            _close(schema)
    resources = [(f"{key}.json", Resource.from_contents(schema)) for key, schema in schemas.items()]
    registry: Registry[Any] = Registry().with_resources(resources)
    return Draft202012Validator(schemas[name], registry=registry)


def _close(schema: Any) -> None:
    """Forbid undescribed properties wherever an object's are listed and not open on purpose."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" not in schema:
            schema["unevaluatedProperties"] = False
        for item in schema.values():
            _close(item)


def faults(name: str, payload: object, *, strict: bool = True) -> list[str]:
    """What is wrong with an object by its schema; empty if nothing is."""
    found = validator(name, strict=strict).iter_errors(payload)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]
