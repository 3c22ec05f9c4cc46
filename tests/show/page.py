"""What a browser would make of HTML: which elements, and which text."""

from __future__ import annotations

from html.parser import HTMLParser


def elements(html) -> set[str]:
    """The names of all elements; fails on an event handler and on an address beyond the page."""
    found = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.add(tag)
            for name, value in attributes:
                assert not name.startswith("on") and name not in ("href", "srcdoc"), name
                assert name != "src" or value.startswith("data:image/jpeg;base64,"), value

        def handle_comment(self, data):
            raise AssertionError(f"a comment: {data}")

        handle_decl = unknown_decl = handle_pi = handle_comment

    Parser().feed(str(html))
    return found


def text_of(html) -> str:
    """The text that a person reads."""
    parts: list[str] = []

    class Parser(HTMLParser):
        def handle_data(self, data):
            parts.append(data)

    Parser().feed(str(html))
    return "".join(parts)
