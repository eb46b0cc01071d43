"""The Jinja environment of chat templates, with the extensions of transformers. No torch."""

import json
from typing import Any


def environment() -> Any:
    """A sandboxed environment: `generation` blocks, loop controls, `raise_exception`, and `tojson` of transformers.

    Templates raise jinja2.TemplateError by `raise_exception`.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """`{% generation %}...{% endgeneration %}`: the body, in a scope of its own as in transformers."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    return made


def needs_date(template: str) -> bool:
    """Whether a template calls `strftime_now` without testing whether it is defined."""
    from jinja2 import nodes

    tree = environment().parse(template)

    def is_function(node: Any) -> bool:
        return isinstance(node, nodes.Name) and node.name == "strftime_now"

    is_called = any(is_function(call.node) for call in tree.find_all(nodes.Call))
    is_tested = any(test.name == "defined" and is_function(test.node) for test in tree.find_all(nodes.Test))
    return is_called and not is_tested


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter, this escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
