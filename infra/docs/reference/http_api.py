"""Every route with its body and answer, from the OpenAPI document of the server."""

import json
import re
from typing import Any

from infra.docs.reference.markdown import code, table, text


def document() -> dict[str, Any]:
    """Returns the OpenAPI document of a server with all routes; no bundle is opened."""
    from serving.api.app import create_app
    from serving.traffic.router import Router

    class Unopened(Router):
        """Stands in for the bundle that answers: the document describes routes alone."""

        def __init__(self) -> None:
            pass

        def watch(self, *_: Any) -> None:
            pass

    return create_app(Unopened()).openapi()


def routes() -> str:
    """Returns a section for each route, and for each object that their fields name."""
    found = document()
    schemas = found["components"]["schemas"]
    sections = [
        _route(method, path, route, schemas)
        for path, methods in found["paths"].items()
        for method, route in methods.items()
    ]
    return "\n\n".join([*sections, "## Objects", *_objects(schemas, "\n".join(sections))])


def _objects(schemas: dict[str, Any], sections: str) -> list[str]:
    """Returns a section for each schema that a type in the sections names."""
    return [
        f"### {name}\n\n{text(schema.get('description', ''))}\n\n{_fields(schema, schemas)}"
        for name, schema in schemas.items()
        if re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", sections)
    ]


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Returns the example of an object as a block of JSON, or nothing."""
    shape = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    return "".join(f"```json\n{json.dumps(one)}\n```" for one in shape.get("examples", ())[:1])


def _route(method: str, path: str, route: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path}", text(route.get("description", route.get("summary", "")))]
    if parameters := route.get("parameters"):
        rows = [(code(one["name"]), code(_type(one["schema"])), one["in"]) for one in parameters]
        lines.append(table(("parameter", "type", "place"), rows))
    body = _schema(route.get("requestBody", {}))
    if body:
        lines += ["**Body**", _fields(body, schemas), _example(body, schemas)]
    for status, answer in route["responses"].items():
        if status.startswith("2"):
            shown = _schema(answer)
            fields = _fields(shown, schemas) if "$ref" in (shown or {}) else ""
            lines += [f"**Answer** {status}", fields] if fields else []
    refused = sorted(status for status in route["responses"] if not status.startswith("2"))
    if refused:
        lines.append(f"**Refusals** {', '.join(refused)}, as [problem documents](#problems).")
    return "\n\n".join(line for line in lines if line)


def _schema(holder: dict[str, Any]) -> dict[str, Any] | None:
    content = holder.get("content", {})
    schema: dict[str, Any] | None = content.get("application/json", {}).get("schema")
    return schema


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Returns a table of an object's fields, and of the objects in them."""
    name = schema.get("$ref", "").rpartition("/")[2]
    shape = schemas.get(name, schema)
    required = set(shape.get("required", ()))
    rows = [
        (code(field), code(_type(about)), "yes" if field in required else "", text(about.get("description", "")))
        for field, about in shape.get("properties", {}).items()
    ]
    return table(("field", "type", "required", "meaning"), rows) if rows else ""


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for many in ("anyOf", "oneOf", "allOf"):
        if many in schema:
            kinds = [_type(one) for one in schema[many] if one.get("type") != "null"]
            return " | ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
